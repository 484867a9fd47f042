"""Which modules a configuration means: those to adapt, those to train in full, and those that "all" leaves out."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from lora_plugins.config import LoraConfig
from lora_plugins.errors import TargetError, listing, quoted
from lora_plugins.inplace import full_name
from lora_plugins.plan import patterns
from lora_plugins.plan.block_filter import BlockFilter
from lora_plugins.plan.hints import inner_hint, nearest_layer, saved_hint, target_hint
from lora_plugins.plan.sites import Site, Survey
from lora_plugins.plugins import Registry
from lora_plugins.utils import path_starts, within

_ADAPTED_BY_OTHERS = (
    "Another library has adapted the model. Take its adapter off or merge it first, and adapt the model that this "
    "returns; in PEFT: model = peft_model.unload(), or merge_and_unload()."
)


@dataclass(frozen=True)
class LeftOut:
    """Layers of one type that `target_modules="all"` does not adapt.

    Args:
        class_name: Name of their class; with its path where a class of torch has that name.
        layers: Their full names.
        reason: Why they are not adapted.
    """

    class_name: str
    layers: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        return f"not adapted: {self.class_name} ({listing(self.layers, 3)}): {self.reason}"


def saved_modules(config: LoraConfig, survey: Survey) -> set[str]:
    """Returns the modules and parameters of `modules_to_save`, under all their names."""
    names = [name for site in survey.sites for name in site.names if name]
    layers = [site.name for site in survey.sites if site.has_parameters and site.name]
    hint = partial(saved_hint, names=[*names, *survey.parameters], layers=layers)
    found = patterns.select("modules_to_save", config.modules_to_save, [*names, *survey.parameters], hint)
    chosen = {name for matches in found.values() for name in matches}
    return {name for site in survey.sites for name in site.names if chosen & set(site.names)} | chosen


def target_sites(config: LoraConfig, survey: Survey, registry: Registry, saved: set[str]) -> list[Site]:
    """Returns the layers to adapt, each served by a plugin.

    Raises:
        TargetError: If a pattern matches nothing, or a layer that no plugin serves.
    """
    free = survey.outside(saved)
    handled = {name for site in free if site.plugin for name in site.names}
    chosen = _targeted(config, survey.sites, free, handled, registry)
    chosen -= _excluded(config, survey.sites, free)
    if config.layers_to_transform is not None:
        keep = BlockFilter(config.layers_to_transform, config.layers_pattern, sorted(chosen & handled))
        chosen = {name for name in chosen if keep(name)}
    targets = [site for site in free if chosen & set(site.names)]
    _check_served([site for site in targets if site.plugin is None], registry)
    _check_unwrapped(targets, [site for site in free if site.plugin and not site.foreign_adapter])
    targets = [site for site in targets if site.plugin is not None]
    if not targets:
        others = "".join(f" {each}." for each in left_out(config, survey, saved))
        if not any(site.plugin for site in survey.sites):
            raise TargetError(
                f"target_modules: the model has no layer of a type that a plugin adapts.{others} A plugin for a type "
                f"of your own is a few lines, which `lora-plugins new-plugin` writes.{registry.absent()}"
            ) from registry.cause()
        raise TargetError(
            "target_modules: nothing is left to adapt after exclude_modules, layers_to_transform and "
            f"modules_to_save. Layers that could be adapted: {listing(sorted(handled)) or 'none'}.{others}"
        )
    return targets


def _targeted(
    config: LoraConfig, sites: Sequence[Site], free: Sequence[Site], handled: set[str], registry: Registry
) -> set[str]:
    wanted = config.target_modules or "all"
    if wanted == "all":
        return handled - {name for site in free if site.foreign_adapter for name in site.names}
    names = [name for site in sites for name in site.names if name or site.has_parameters]
    served = [site for site in free if site.plugin]
    hint = partial(target_hint, patterns=wanted, sites=served)
    matched = patterns.select("target_modules", wanted, names, hint)
    targetable = {name for site in free for name in site.names}
    found = {pattern: [name for name in matches if name in targetable] for pattern, matches in matched.items()}
    for pattern, matches in found.items():
        if not matches:
            raise TargetError(
                f"target_modules: {quoted(pattern)} matches {listing(matched[pattern])}, which modules_to_save trains "
                "in full. Take it out of one of the two."
            )
        if not handled & set(matches):
            raise TargetError(
                f"target_modules: {quoted(pattern)} matches {listing(matches)}, which no plugin adapts. "
                f"{_instead(pattern, matches, free, handled)}{registry.absent()}"
            ) from registry.cause()
    return {name for matches in found.values() for name in matches}


def _instead(pattern: str, matches: Sequence[str], free: Sequence[Site], handled: set[str]) -> str:
    """Says what to do where a pattern matches modules, and none that a plugin adapts."""
    known = _of_others(matches, free) or inner_hint(matches, handled)
    types = {_title(site): None for site in free if site.matrices and not site.scripted and {*matches} & {*site.names}}
    if known or not types:
        return known or nearest_layer(pattern, handled)
    close = f"{patterns.nearest(pattern, handled)} " if handled else ""
    return f"{close}A plugin for {listing(types)} is a few lines, which `lora-plugins new-plugin` writes."


def _of_others(matches: Sequence[str], free: Sequence[Site]) -> str:
    """Says what to do where matched modules are wrappers of another library, with its adapter below them."""
    adapters = [name for site in free if site.foreign_adapter for name in site.names]
    return _ADAPTED_BY_OTHERS if any(within(name, matches) for name in adapters) else ""


def left_out(config: LoraConfig, survey: Survey, saved: set[str], failed: str = "") -> tuple[LeftOut, ...]:
    """Returns what "all" leaves out though it has weights of two dimensions or more; nothing for other targets.

    What is said of plugins that `failed` is told as well: one of them may be missing here.
    """
    if config.target_modules not in (None, "all") or config.layers_to_transform is not None:
        return ()
    free = survey.outside(saved)
    excluded = _excluded(config, survey.sites, free)
    found: dict[tuple[str, str], list[str]] = {}
    free = [site for site in free if not excluded & set(site.names)]
    adapted = _weights_of_layers(free, survey)
    for site in free:
        if site.matrices and (reason := _reason(site, adapted, failed)):
            found.setdefault((_title(site), reason), []).append(site.name or "the model itself")
    return tuple(LeftOut(cls, tuple(names), reason) for (cls, reason), names in found.items())


def _title(site: Site) -> str:
    """Returns the name of a class; with its path where a class of torch has it too, as `Linear` of torch_geometric."""
    of_others = hasattr(nn, site.class_name) and not site.class_path.startswith("torch.")
    return site.class_path if of_others else site.class_name


def _weights_of_layers(sites: Iterable[Site], survey: Survey) -> dict[str, str]:
    """Returns the name that a layer with a plugin has for a parameter, by all full names of those with several."""
    weights = {full_name(site.name, slot.tensor) for site in sites if site.plugin for slot in site.slots}
    found: dict[str, str] = {}
    for first, parameter in survey.parameters.items():
        names = (first, *parameter.aliases)
        if parameter.aliases and (of_layers := [name for name in names if name in weights]):
            found |= dict.fromkeys(names, of_layers[0])
    return found


def _reason(site: Site, adapted: Mapping[str, str], failed: str) -> str:
    if site.foreign_adapter:
        return "they belong to an adapter of another library; merge it into the base, or name them"
    if site.plugin is not None:
        return ""
    shared = [adapted[name] for key in site.matrices if (name := full_name(site.name, key)) in adapted]
    reads = f". It reads {listing(shared, 3)} without the update, which cannot be merged" if shared else ""
    said = f".{failed.removesuffix('.')}" if failed else ""
    return f"no plugin adapts this type, which has {listing(site.matrices, 3)}{reads}{said}"


def _excluded(config: LoraConfig, sites: Sequence[Site], free: Sequence[Site]) -> set[str]:
    everywhere = [name for site in sites for name in site.names]
    names: set[str] = set()
    for pattern, matches in patterns.select("exclude_modules", config.exclude_modules, everywhere).items():
        excluded = [site for site in free if set(site.names) & set(matches)]
        if not any(site.plugin or site.has_parameters for site in excluded):
            handled = {name for site in free if site.plugin for name in site.names}
            raise TargetError(
                f"exclude_modules: {quoted(pattern)} matches {listing(matches)}, which is no layer and excludes none. "
                f"{_all_below(config.exclude_modules, matches, handled) or nearest_layer(pattern, handled)}"
            )
        names |= {name for site in excluded for name in site.names}
    return names


def _all_below(wanted: Sequence[str] | str, containers: Sequence[str], names: Iterable[str]) -> str:
    """Returns how to exclude all layers in modules that are no layers; empty if there are none in them."""
    if not any(name.startswith(f"{container}.") for name in names for container in containers):
        return ""
    if isinstance(wanted, str):
        expression = rf"(?:{wanted})(?:\..+)?"
    else:
        expression = rf"(?:.*\.)?(?:{'|'.join(map(patterns.exact_expression, wanted))})(?:\..+)?"
    return f"Name the layers in it, or write a regular expression: exclude_modules={expression!r}."


def _check_served(sites: list[Site], registry: Registry) -> None:
    """Refuses targets with parameters of their own that no plugin adapts; mere containers are passed over."""
    owners = [f"{site.name} ({_title(site)})" for site in sites if site.has_parameters]
    if owners:
        raise TargetError(
            f"target_modules matches layers that no plugin adapts: {listing(owners)}. Make the pattern narrower, "
            f"or add them to exclude_modules.{registry.absent()}"
        ) from registry.cause()


def _check_unwrapped(targets: Iterable[Site], layers: Sequence[Site]) -> None:
    """Refuses wrappers of another library that are matched among layers, where the layers in them are not."""
    chosen = {site.name for site in targets}
    first_in: dict[str, str] = {}
    for layer in layers:
        for start in path_starts(layer.name):
            first_in.setdefault(start, layer.name)
    wrappers = [site for site in targets if site.foreign_adapter and site.plugin is None]
    inner = {each.name: next((first_in[name] for name in each.names if name in first_in), None) for each in wrappers}
    passed = {name: layer for name, layer in inner.items() if layer and layer not in chosen}
    if passed:
        raise TargetError(
            f"target_modules matches {listing(passed)}, and not the layers in them. {_ADAPTED_BY_OTHERS} To adapt them "
            f"beside its adapter, name them, such as {listing(passed.values(), 2)}, or write 'all'."
        )
