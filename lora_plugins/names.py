"""What the project is called where names matter, without anything to import."""

DISTRIBUTION = "lora-plugins"
"""What pip calls it."""

MANIFEST = "adapter.json"
"""Name of the manifest in an adapter folder."""

DEFAULT_ADAPTER = "default"
"""Name of an adapter that is given none."""

TRACEBACK_VARIABLE = "LORA_PLUGINS_TRACEBACK"
"""Environment variable; if it is set, the program shows errors with their traceback."""
