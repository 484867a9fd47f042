"""Registries with plugins that tests define."""

from lora_plugins import hookimpl
from lora_plugins.plugins import KINDS, build_registry


def registers(*plugins, override=False):
    """What an entry point names: it registers these plugins, of whatever kinds."""

    def hook(kind):
        def register(registrar):
            for each in plugins:
                if isinstance(each, kind.base):
                    registrar.add(each, override=override)

        return staticmethod(hookimpl(register))

    return type("Plugin", (), {kind.hook_name: hook(kind) for kind in KINDS})()


def registry_of(*plugins):
    """The registry of all installed plugins and these, which belong to one that is called `mine`."""
    return build_registry([("mine", registers(*plugins))])
