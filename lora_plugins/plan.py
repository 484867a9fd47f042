"""What would be adapted: every decision about a model, made and checked before anything is touched."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lora_plugins import patterns
from lora_plugins.config import LoraConfig
from lora_plugins.errors import ConfigError, TargetError, listing, near
from lora_plugins.init_plugin import InitPlugin
from lora_plugins.layer import base_class_of, peek_weight, state_of, weight_key
from lora_plugins.layer_plugin import BranchUse, LayerPlugin, Slot
from lora_plugins.modules import NamedModule, model_modules, own_tensors, persistent_buffers
from lora_plugins.norm import has_statistics
from lora_plugins.registry import Registry, class_path


@dataclass(frozen=True)
class Tie:
    """A weight of another layer that is the same tensor, and so gets the same update.

    Args:
        layer: Name of the other layer.
        tensor: Attribute name of the weight there.
        source: Attribute name of the weight in the layer that has the adapter.
    """

    layer: str
    tensor: str
    source: str


@dataclass(frozen=True)
class PlannedLayer:
    """One layer that is to be adapted.

    Args:
        name: Full name of the layer.
        aliases: Other names of the same module.
        module_class: Name of its class.
        plugin: The plugin that serves it.
        branch_use: When the plugin's branch replaces the layer's own forward.
        slots: Where the updates go.
        shapes: `(out, in)` of the matrix view of each slot.
        r: Rank.
        alpha: Numerator of the scaling.
        scaling: Factor of `B @ A`.
        dropout: Dropout of the branch's input.
        ties: Weights of other targeted layers that are the same tensor.
    """

    name: str
    aliases: tuple[str, ...]
    module_class: str
    plugin: LayerPlugin
    branch_use: BranchUse
    slots: tuple[Slot, ...]
    shapes: tuple[tuple[int, int], ...]
    r: int
    alpha: float
    scaling: float
    dropout: float
    ties: tuple[Tie, ...] = ()

    @property
    def parameters(self) -> int:
        """The number of elements of all A and B of the layer."""
        return sum(self.r * (rows + columns) for rows, columns in self.shapes)


@dataclass(frozen=True)
class Plan:
    """What one adapter would do to one model.

    Args:
        config: The configuration.
        init: The init plugin.
        layers: The layers to adapt, in the order of the model.
        trained: Names of the model's own parameters that are trained in place: heads and biases.
        saved_buffers: Names of buffers that move during training and are saved with the adapter.
        frozen_norms: Names of normalisation layers that are kept in eval mode.
        base_parameters: The number of elements of all parameters of the model.
        trained_parameters: The number of elements of `trained`.
    """

    config: LoraConfig
    init: InitPlugin
    layers: tuple[PlannedLayer, ...]
    trained: tuple[str, ...]
    saved_buffers: tuple[str, ...]
    frozen_norms: tuple[str, ...]
    base_parameters: int
    trained_parameters: int

    @property
    def adapter_parameters(self) -> int:
        """The number of elements of all A and B."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def trainable(self) -> int:
        """The number of elements that would be trained."""
        return self.adapter_parameters + self.trained_parameters

    @property
    def total(self) -> int:
        """The number of elements of the model with the adapter."""
        return self.base_parameters + self.adapter_parameters

    def weights(self) -> dict[str, set[str]]:
        """Returns the attribute names of the updated weights by layer name, tied layers included."""
        found: dict[str, set[str]] = {}
        for layer in self.layers:
            found[layer.name] = {slot.tensor for slot in layer.slots}
            for tie in layer.ties:
                found.setdefault(tie.layer, set()).add(tie.tensor)
        return found

    def summary(self) -> str:
        """Returns one line with the counts."""
        return (
            f"{len(self.layers)} layers adapted, {self.trainable:,} of {self.total:,} parameters trainable "
            f"({self.trainable / self.total:.2%}): {self.adapter_parameters:,} in A and B, "
            f"{self.trained_parameters:,} trained in place"
        )

    def rows(self) -> list[tuple[str, str, str, str, str, str]]:
        """Returns for each layer: name, class, plugin, rank, alpha and parameter count, as text."""
        return [
            (
                " = ".join((layer.name or "(the model)", *layer.aliases, *(tie.layer for tie in layer.ties)))
                + "".join(f"[{slot.part}]" for slot in layer.slots if slot.part),
                layer.module_class,
                layer.plugin.name,
                str(layer.r),
                f"{layer.alpha:g}",
                f"{layer.parameters:,}",
            )
            for layer in self.layers
        ]

    def __str__(self) -> str:
        table = [("layer", "class", "plugin", "r", "alpha", "parameters"), *self.rows()]
        widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        ]
        if self.trained:
            lines.append(f"trained in place: {listing(self.trained)}")
        return "\n".join([*lines, self.summary()])


def make_plan(model: nn.Module, config: LoraConfig, registry: Registry) -> Plan:
    """Decides what an adapter would do to a model; touches nothing.

    Args:
        model: Any module, adapted already or not.
        config: The configuration of the adapter.
        registry: The layer types and inits there are.

    Raises:
        TargetError: If a pattern matches nothing, two of them tie, or a targeted layer cannot be served.
        PluginError: If there is no such init.
        ConfigError: If an option of the init is unknown or wrong.
    """
    init = _checked_init(config, registry)
    modules = model_modules(model)
    parameters = own_tensors(model, modules, "_parameters")
    _refuse_shapeless(parameters)
    saved = _saved(config, modules, parameters)
    targets = _targets(config, modules, registry, saved)
    layers = _layers(config, targets, init)
    adapted = {weight_key(entry.module, slot.tensor) for entry, layer in layers for slot in layer.slots}
    trained = _trained(config, parameters, saved, layers)
    for name in trained:
        if id(parameters[name]) in adapted:
            raise TargetError(
                f"{name!r} would be trained in place and is also the weight of an adapted layer. Take it out of "
                "modules_to_save, or add the layer to exclude_modules."
            )
    norms = [entry for entry in modules if has_statistics(entry.module) and not _within(entry.name, saved)]
    tracked = {entry.name for entry in norms} if config.norm == "track" else set()
    return Plan(
        config=config,
        init=init,
        layers=tuple(layer for _, layer in layers),
        trained=tuple(trained),
        saved_buffers=tuple(
            name for name in persistent_buffers(model, modules) if _within(name, saved) or _within(name, tracked)
        ),
        frozen_norms=tuple(entry.name for entry in norms if entry.name not in tracked),
        base_parameters=sum(parameter.numel() for parameter in parameters.values()),
        trained_parameters=sum(parameters[name].numel() for name in trained),
    )


def _refuse_shapeless(parameters: Mapping[str, Tensor]) -> None:
    lazy = [name for name, parameter in parameters.items() if is_lazy(parameter)]
    if lazy:
        raise TargetError(f"{listing(lazy)} has no shape yet. Run the model once on a batch, then adapt it.")


def init_options(plan: Plan) -> Mapping[str, object]:
    """Returns the options of the plan's init, defaults included."""
    return {**plan.init.options, **plan.config.init_options}


def _checked_init(config: LoraConfig, registry: Registry) -> InitPlugin:
    init = registry.init(config.init)
    for key in config.init_options:
        if key not in init.options:
            raise ConfigError(f"init_options: {config.init!r} has no option {key!r}. {near(key, init.options)}")
    init.check_options({**init.options, **config.init_options})
    return init


def _within(name: str, roots: Iterable[str]) -> bool:
    """Whether a module or tensor is one of `roots` or lies below one of them."""
    return any(not root or name == root or name.startswith(root + ".") for root in roots)


def _saved(config: LoraConfig, modules: list[NamedModule], parameters: Mapping[str, Tensor]) -> set[str]:
    """The modules and parameters of `modules_to_save`, under all their names."""
    names = [name for entry in modules for name in entry.names if name]
    found = patterns.select("modules_to_save", config.modules_to_save, [*names, *parameters])
    chosen = {name for matches in found.values() for name in matches}
    return {name for entry in modules for name in entry.names if chosen & set(entry.names)} | chosen


def _targets(
    config: LoraConfig, modules: list[NamedModule], registry: Registry, saved: set[str]
) -> list[tuple[NamedModule, LayerPlugin]]:
    """The modules to adapt, with their plugins."""
    free = [entry for entry in modules if not any(_within(name, saved) for name in entry.names)]
    plugins = {entry.name: registry.layer_for(base_class_of(entry.module)) for entry in free}
    everything = config.target_modules == "all"
    names = [name for entry in free for name in entry.names if name or entry.module._parameters]
    handled = {name for entry in free for name in entry.names if plugins[entry.name]}
    if everything:
        chosen = set(handled)
    else:
        found = patterns.select("target_modules", config.target_modules, names)
        for pattern, matches in found.items():
            if not handled & set(matches):
                raise TargetError(
                    f"target_modules: {pattern!r} matches {listing(matches)}, which no plugin adapts. "
                    f"{patterns.nearest(pattern, handled)}"
                )
        chosen = {name for matches in found.values() for name in matches}
    for pattern, matches in patterns.select("exclude_modules", config.exclude_modules, names).items():
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
    _refuse_unhandled([entry for entry in entries if plugins[entry.name] is None])
    targets = [(entry, plugin) for entry in entries if (plugin := plugins[entry.name]) is not None]
    if not targets:
        raise TargetError(
            "target_modules: nothing is left to adapt after exclude_modules, layers_to_transform and "
            f"modules_to_save. Layers that could be adapted: {listing(sorted(handled))}."
        )
    return targets


def _refuse_unhandled(entries: list[NamedModule]) -> None:
    """Refuses targets with parameters of their own that no plugin adapts; mere containers are passed over."""
    owners = [f"{entry.name} ({type(entry.module).__name__})" for entry in entries if entry.module._parameters]
    if owners:
        raise TargetError(
            f"target_modules matches layers that no plugin adapts: {listing(owners)}. Make the pattern narrower, "
            "or add them to exclude_modules."
        )


def _layers(
    config: LoraConfig, targets: list[tuple[NamedModule, LayerPlugin]], init: InitPlugin
) -> list[tuple[NamedModule, PlannedLayer]]:
    names = [name for entry, _ in targets for name in entry.names]
    ranks = patterns.PatternMap("rank_pattern", config.rank_pattern, names)
    alphas = patterns.PatternMap("alpha_pattern", config.alpha_pattern, names)
    fused = patterns.PatternMap("fused_parts", config.fused_parts, names)
    owners: dict[object, int] = {}
    ties: dict[int, list[Tie]] = {}
    planned: list[tuple[NamedModule, PlannedLayer]] = []
    refused: list[str] = []
    for entry, plugin in targets:
        slots = _slots(entry, plugin, fused.get(entry.names, []))
        reason = _refusal(entry.module, slots, init)
        branch_use: BranchUse = "never" if reason else _branch_use(entry.module, plugin)
        if config.dropout and (branch_use == "never" or plugin.lookup):
            reason = reason or (
                f"{base_class_of(entry.module).__name__} cannot honour dropout={config.dropout}; set dropout=0 or "
                "exclude the layer"
            )
        if reason:
            refused.append(f"{entry.name!r}: {reason}")
            continue
        tie = _tie(entry, slots, planned, owners)
        if tie is not None:
            ties.setdefault(owners[_key(entry, slots[0])], []).append(tie)
            continue
        owners.update({_key(entry, slot): len(planned) for slot in slots})
        r, alpha = ranks.get(entry.names, config.r), alphas.get(entry.names, config.alpha)
        planned.append(
            (
                entry,
                PlannedLayer(
                    name=entry.name,
                    aliases=entry.aliases,
                    module_class=base_class_of(entry.module).__name__,
                    plugin=plugin,
                    branch_use=branch_use,
                    slots=slots,
                    shapes=tuple(_shape(entry.module, plugin, slot) for slot in slots),
                    r=r,
                    alpha=alpha,
                    scaling=alpha / (math.sqrt(r) if config.use_rslora else r),
                    dropout=config.dropout,
                ),
            )
        )
    if refused:
        raise TargetError("These layers cannot be adapted:\n  " + "\n  ".join(refused))
    return [(entry, _tied(layer, ties.get(at, []))) for at, (entry, layer) in enumerate(planned)]


def _tied(layer: PlannedLayer, ties: list[Tie]) -> PlannedLayer:
    if not ties:
        return layer
    return replace(layer, ties=tuple(ties))


def _tie(
    entry: NamedModule,
    slots: tuple[Slot, ...],
    planned: list[tuple[NamedModule, PlannedLayer]],
    owners: dict[object, int],
) -> Tie | None:
    """The tie of a layer whose weight another targeted layer has already."""
    shared = [slot for slot in slots if _key(entry, slot) in owners]
    if not shared:
        return None
    key = _key(entry, shared[0])
    other, layer = planned[owners[key]]
    if len({slot.tensor for slot in slots}) > 1:
        raise TargetError(
            f"{entry.name!r} shares a weight with {other.name!r} and has others of its own. Exclude one of the two."
        )
    source = next(slot.tensor for slot in layer.slots if _key(other, slot) == key)
    return Tie(entry.name, shared[0].tensor, source)


def _key(entry: NamedModule, slot: Slot) -> object:
    """Identifies a weight; a computed one belongs to its own layer only."""
    return weight_key(entry.module, slot.tensor) or (entry.name, slot.tensor)


def _slots(entry: NamedModule, plugin: LayerPlugin, wanted: list[str]) -> tuple[Slot, ...]:
    if not wanted:
        return tuple(plugin.slots(entry.module))
    parts = plugin.parts(entry.module)
    for part in wanted:
        if part not in parts:
            reason = near(part, parts) if parts else f"A {type(entry.module).__name__} of its size has no parts."
            raise TargetError(f"fused_parts: {entry.name!r} has no part {part!r}. {reason}")
    return tuple(parts[part] for part in parts if part in wanted)


def _shape(layer: nn.Module, plugin: LayerPlugin, slot: Slot) -> tuple[int, int]:
    rows, columns = plugin.to_matrix(peek_weight(layer, slot.tensor)).shape
    return (slot.rows[1] - slot.rows[0] if slot.rows else rows), columns


def _branch_use(layer: nn.Module, plugin: LayerPlugin) -> BranchUse:
    if class_path(base_class_of(layer)) not in {class_path(cls) for cls in plugin.branch_types}:
        return "never"
    return plugin.branch_use


def _refusal(layer: nn.Module, slots: tuple[Slot, ...], init: InitPlugin) -> str | None:
    """Why a layer cannot be adapted; None if it can."""
    if isinstance(layer, torch.jit.ScriptModule):
        return "it is a TorchScript module; adapt the Python module, before torch.jit.script"
    for slot in slots:
        factor = f"lora_A{slot.suffix}"
        if state_of(layer) is None and hasattr(layer, factor):
            return f"it has an attribute {factor!r} already; remove the other LoRA library's adapter first"
        if weight_key(layer, slot.tensor) is None and init.changes_base:
            return f"{slot.tensor!r} is computed, so the init {init.name!r} cannot replace it"
        weight = peek_weight(layer, slot.tensor)
        if not weight.dtype.is_floating_point:
            return f"{slot.tensor!r} has the type {weight.dtype}, not a floating one"
        if weight.is_meta:
            return f"{slot.tensor!r} is on the meta device; load its values first"
    return None


def _trained(
    config: LoraConfig,
    parameters: Mapping[str, Tensor],
    saved: set[str],
    layers: list[tuple[NamedModule, PlannedLayer]],
) -> list[str]:
    """Names of the model's own parameters to train, in the order of the model."""
    adapted = {
        f"{layer.name}.{bias}".removeprefix(".")
        for entry, layer in layers
        for bias in layer.plugin.biases(entry.module)
    }
    chosen: Mapping[str, Callable[[str], bool]] = {
        "none": lambda name: False,
        "all": lambda name: name.rpartition(".")[2] == "bias" or name.endswith("_bias"),
        "lora_only": lambda name: name in adapted,
    }
    is_bias = chosen[config.bias]
    return [
        name
        for name, parameter in parameters.items()
        if parameter.dtype.is_floating_point and (_within(name, saved) or is_bias(name))
    ]
