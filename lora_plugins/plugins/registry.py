"""What the installed plugins provide: lookup of layer types by module class, and of everything by name."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lora_plugins.errors import PluginError, near, near_matches, sentence
from lora_plugins.plugins.kind import P, PluginKind, class_path
from lora_plugins.plugins.layer import LAYERS, LayerPlugin
from lora_plugins.plugins.overrides import grouped, replaced
from lora_plugins.plugins.owned import Owned, PluginInfo


@dataclass(frozen=True)
class Registry:
    """Everything that one set of plugins provides; built by `lora_plugins.plugins.build_registry`.

    Args:
        plugins: Every plugin that was found, loaded or not.
        by_kind: By the name of a kind, its objects by their names.
    """

    plugins: tuple[PluginInfo, ...]
    by_kind: Mapping[str, Mapping[str, Owned[Any]]]

    def of(self, kind: PluginKind[P]) -> Mapping[str, Owned[P]]:
        """Returns all objects of a kind by name."""
        return self.by_kind.get(kind.name, {})

    def get(self, kind: PluginKind[P], name: str) -> P:
        """Returns an object by its kind and name.

        Raises:
            PluginError: If there is none of that name, from the error of a plugin that failed to load if one did.
        """
        owned = self.of(kind)
        if name in owned:
            return owned[name].plugin
        typo = bool(near_matches(name, owned))  # which has no plugin as its cause
        named = any(info.name == name for info in self.plugins)
        said = kind.words.get(name.lower()) or near(name, [*owned, *kind.reserved])
        cause = self.cause(name) if named or not typo else None
        raise PluginError(f"There is no {kind.title} {name!r}. {said}{self.absent()}") from cause

    def layer_for(self, module_class: type[nn.Module]) -> LayerPlugin[Any] | None:
        """Returns the plugin of the most specific class in the MRO of a module class; None if there is none.

        Raises:
            PluginError: If two claim that class, one of them by a path that leads to it now that its package is
                imported.
        """
        claims = grouped(LAYERS.claims["module class"], self.of(LAYERS).values())
        owners = next((claims[path] for path in map(class_path, module_class.__mro__) if path in claims), [])
        pairs, clashes = replaced(LAYERS, owners)
        if clashes:
            raise PluginError("\n".join(clashes))
        gone = [id(loser) for loser, _ in pairs]
        return next((each.plugin for each in owners if id(each) not in gone), None)

    def with_layer_types(self, names: Iterable[str]) -> "Registry":
        """Returns the registry with those layer types alone."""
        wanted = set(names)
        kept = {name: owned for name, owned in self.of(LAYERS).items() if name in wanted}
        return replace(self, by_kind={**self.by_kind, LAYERS.name: kept})

    def absent(self) -> str:
        """Returns sentences on the plugins that failed or are blocked, for a message about something missing."""
        blocked = "".join(f" Plugin {info.owner} is {sentence(info.state)}" for info in self.plugins if info.blocked)
        return f"{self.failed()}{blocked}"

    def failed(self) -> str:
        """Returns sentences on the plugins that failed, which nobody asked for."""
        return "".join(
            f" Plugin {info.owner} {sentence(info.state)}" for info in self.plugins if info.error is not None
        )

    def cause(self, name: str = "") -> BaseException | None:
        """Returns the error of a plugin that failed, that of the plugin called `name` first; None if none did."""
        failed = [info for info in self.plugins if info.error is not None]
        return min(failed, key=lambda info: info.name != name).error if failed else None
