"""Which modules a configuration means: those to adapt, and those to train in full."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from lora_plugins.config import LoraConfig
from lora_plugins.errors import TargetError, listing
from lora_plugins.inplace.layer import base_class_of
from lora_plugins.inplace.modules import NamedModule
from lora_plugins.plan import patterns
from lora_plugins.plugins.layer import LayerPlugin
from lora_plugins.plugins.registry import Registry


def within(name: str, roots: Iterable[str]) -> bool:
    """Whether a module or tensor is one of `roots` or lies below one of them."""
    return any(not root or name == root or name.startswith(root + ".") for root in roots)


def saved_modules(config: LoraConfig, modules: list[NamedModule], parameters: Mapping[str, Tensor]) -> set[str]:
    """The modules and parameters of `modules_to_save`, under all their names."""
    names = [name for entry in modules for name in entry.names if name]
    found = patterns.select("modules_to_save", config.modules_to_save, [*names, *parameters])
    chosen = {name for matches in found.values() for name in matches}
    return {name for entry in modules for name in entry.names if chosen & set(entry.names)} | chosen


def target_layers(
    config: LoraConfig, modules: list[NamedModule], registry: Registry, saved: set[str]
) -> list[tuple[NamedModule, LayerPlugin]]:
    """The modules to adapt, with their plugins."""
    free = [entry for entry in modules if not any(within(name, saved) for name in entry.names)]
    plugins = {entry.name: registry.layer_for(base_class_of(entry.module)) for entry in free}
    patterns_given = config.target_modules
    names = [name for entry in free for name in entry.names if name or entry.module._parameters]
    handled = {name for entry in free for name in entry.names if plugins[entry.name]}
    if patterns_given is None or patterns_given == "all":
        chosen = set(handled)
    else:
        found = patterns.select("target_modules", patterns_given, names)
        for pattern, matches in found.items():
            if not handled & set(matches):
                raise TargetError(
                    f"target_modules: {pattern!r} matches {listing(matches)}, which no plugin adapts. "
                    f"{patterns.nearest(pattern, handled)}{registry.absent()}"
                ) from registry.cause()
        chosen = {name for matches in found.values() for name in matches}
    everywhere = [name for entry in modules for name in entry.names]
    for pattern, matches in patterns.select("exclude_modules", config.exclude_modules, everywhere).items():
        excluded = [entry for entry in free if set(entry.names) & set(matches)]
        if not any(plugins[entry.name] or entry.module._parameters for entry in excluded):
            raise TargetError(
                f"exclude_modules: {pattern!r} matches {listing(matches)}, which is no layer and excludes none. Name "
                f"the layers in it, or write a regular expression. {patterns.nearest(pattern, handled)}"
            )
        chosen -= {name for entry in excluded for name in entry.names}
    if config.layers_to_transform is not None:
        keep = patterns.BlockFilter(config.layers_to_transform, config.layers_pattern, sorted(chosen & handled))
        chosen = {name for name in chosen if keep(name)}
    entries = [entry for entry in free if chosen & set(entry.names)]
    _refuse_unhandled([entry for entry in entries if plugins[entry.name] is None], registry)
    targets = [(entry, plugin) for entry in entries if (plugin := plugins[entry.name]) is not None]
    if not targets:
        raise TargetError(
            "target_modules: nothing is left to adapt after exclude_modules, layers_to_transform and "
            f"modules_to_save. Layers that could be adapted: {listing(sorted(handled))}."
        )
    return targets


def _refuse_unhandled(entries: list[NamedModule], registry: Registry) -> None:
    """Refuses targets with parameters of their own that no plugin adapts; mere containers are passed over."""
    owners = [f"{entry.name} ({type(entry.module).__name__})" for entry in entries if entry.module._parameters]
    if owners:
        raise TargetError(
            f"target_modules matches layers that no plugin adapts: {listing(owners)}. Make the pattern narrower, "
            f"or add them to exclude_modules.{registry.absent()}"
        ) from registry.cause()
