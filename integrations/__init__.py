"""Integrations of lora_plugins with other frameworks; imported as `lora_plugins.integrations`."""

if __name__ != "lora_plugins.integrations":
    raise ImportError(
        f"This package was imported as {__name__!r}. Import it as 'lora_plugins.integrations': a file that is "
        "imported under two names becomes two modules, with two sets of classes."
    )
