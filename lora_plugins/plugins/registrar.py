"""What a hook is handed: it takes the objects of one plugin and refuses those that could not work."""

from inspect import isfunction
from typing import Generic

from lora_plugins.errors import PluginError
from lora_plugins.plugins.kind import P, PluginKind
from lora_plugins.plugins.owned import Owned, PluginInfo


class Registrar(Generic[P]):
    """Collects and validates what one plugin registers of one kind.

    Args:
        kind: The kind.
        info: The plugin.
    """

    def __init__(self, kind: PluginKind[P], info: PluginInfo) -> None:
        self.kind = kind
        self.info = info
        self._owned: list[Owned[P]] = []
        self._closed = False

    def __repr__(self) -> str:
        return f"<Registrar of the {self.kind.name} of {self.info.owner}>"

    def add(self, plugin: P, *, override: bool = False) -> None:
        """Adds one plugin object.

        Args:
            plugin: An instance, not a class.
            override: Whether it takes the place of another plugin's object of the same name or for the same module
                class. Without it, two owners are an error. What is replaced shows in `lora-plugins plugins`.

        Raises:
            PluginError: If it is not of the expected class, an attribute cannot have its value, the plugin registered
                that name or class already, or its hook has returned.
        """
        if self._closed:
            raise PluginError(
                f"Plugin {self.info.owner} adds {plugin!r} after {self.kind.hook_name} has returned, when the registry "
                "is built. Add it inside of the hook."
            )
        base = self.kind.base.__name__
        if not isinstance(plugin, self.kind.base):
            of_other = f" {self.kind.hook_name} takes nothing else: each kind has a hook of its own."
            hint = " Register an instance, not the class." if isinstance(plugin, type) else of_other
            raise PluginError(f"Plugin {self.info.owner} registered {plugin!r}, which is no {base}.{hint}")
        wrong = self._wrong(plugin)
        if wrong:
            raise PluginError(f"Plugin {self.info.owner}: {type(plugin).__name__} {wrong}; see {base}.")
        self._owned.append(Owned(plugin, self.info, override))

    def close(self) -> None:
        """Refuses further objects: what is added from now on would be in no registry."""
        self._closed = True

    @property
    def owned(self) -> list[Owned[P]]:
        """What was added, with who brought it."""
        return list(self._owned)

    def _wrong(self, plugin: P) -> str:
        """Says why an object cannot be registered; empty if it can."""
        for attribute, (is_proper, expected) in self.kind.rules.items():
            value = getattr(plugin, attribute, None)
            if not is_proper(value):
                return f"sets {attribute!r} to {value!r}. It has to be {expected}"
        for name in dir(self.kind.base):
            value = getattr(plugin, name, None)
            if isfunction(getattr(self.kind.base, name)) and not callable(value):
                return f"sets {name!r} to {value!r}. It has to be a method"
        for what, claim in self.kind.claims.items():
            if any(claim(plugin) == claim(owned.plugin) for owned in self._owned):
                return f"claims the {what} {claim(plugin)!r}, which the same plugin registered already"
        return self.kind.contradiction(plugin)
