"""Makes the plan of an adapter: every decision about a model, made and checked before anything is touched."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lora_plugins.config import LoraConfig
from lora_plugins.errors import ConfigError, TargetError, listing, near
from lora_plugins.inplace.frozen_norm import has_statistics
from lora_plugins.inplace.layer import base_class_of, peek_weight, state_of, weight_key
from lora_plugins.inplace.modules import NamedModule, full_name, model_modules, own_tensors, persistent_buffers
from lora_plugins.plan import patterns
from lora_plugins.plan.plan import Plan, PlannedLayer, Tie
from lora_plugins.plan.targets import saved_modules, target_layers, within
from lora_plugins.plugins.init import InitPlugin
from lora_plugins.plugins.layer import BranchUse, LayerPlugin, RowMajorPlugin, Slot
from lora_plugins.plugins.manager import registry_of
from lora_plugins.plugins.registry import Registry, class_path
from lora_plugins.plugins.variant import VariantPlugin


def make_plan(model: nn.Module, config: LoraConfig, registry: Registry | None = None) -> Plan:
    """Decides what an adapter would do to a model; touches nothing.

    Args:
        model: Any module, adapted already or not.
        config: The configuration of the adapter.
        registry: The layer types and inits there are; by default those of the plugins that the config lets load.

    Raises:
        TargetError: If a pattern matches nothing, two of them tie, or a targeted layer cannot be served.
        PluginError: If there is no such init.
        ConfigError: If an option of the init is unknown or wrong.
    """
    registry = registry or registry_of(config)
    init = _checked_init(config, registry)
    modules = model_modules(model)
    parameters = own_tensors(model, modules, "_parameters")
    _refuse_shapeless(parameters)
    saved = saved_modules(config, modules, parameters)
    layers = _layers(config, target_layers(config, modules, registry, saved), init, registry.variant(config.variant))
    adapted = {weight_key(entry.module, slot.tensor) for entry, layer in layers for slot in layer.slots}
    trained = _trained(config, parameters, saved, layers)
    for name in trained:
        if id(parameters[name]) in adapted:
            raise TargetError(
                f"{name!r} would be trained in place and is also the weight of an adapted layer. Take it out of "
                "modules_to_save, or add the layer to exclude_modules."
            )
    norms = [entry for entry in modules if has_statistics(entry.module) and not within(entry.name, saved)]
    tracked = {entry.name for entry in norms} if config.norm == "track" else set()
    return Plan(
        config=config,
        init=init,
        layers=tuple(layer for _, layer in layers),
        trained=tuple(trained),
        saved_buffers=tuple(
            name for name in persistent_buffers(model, modules) if within(name, saved) or within(name, tracked)
        ),
        frozen_norms=tuple(entry.name for entry in norms if entry.name not in tracked),
        base_parameters=sum(parameter.numel() for parameter in parameters.values()),
        trained_parameters=sum(parameters[name].numel() for name in trained),
    )


def _refuse_shapeless(parameters: Mapping[str, Tensor]) -> None:
    lazy = [name for name, parameter in parameters.items() if is_lazy(parameter)]
    if lazy:
        raise TargetError(f"{listing(lazy)} has no shape yet. Run the model once on a batch, then adapt it.")


def _checked_init(config: LoraConfig, registry: Registry) -> InitPlugin:
    init = registry.init(config.init)
    for key in config.init_options:
        if key not in init.options:
            raise ConfigError(f"init_options: {config.init!r} has no option {key!r}. {near(key, init.options)}")
    init.check_options({**init.options, **config.init_options})
    return init


@dataclass(frozen=True)
class _Target:
    """A layer to adapt, with the other targeted layers that share its weight."""

    entry: NamedModule
    plugin: LayerPlugin
    ties: list[tuple[NamedModule, Tie]] = field(default_factory=list)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for entry in (self.entry, *(entry for entry, _ in self.ties)) for name in entry.names)


def _grouped(targets: list[tuple[NamedModule, LayerPlugin]]) -> list[_Target]:
    """Gives targets that share a weight one adapter, that of the first of them."""
    owners: dict[object, tuple[_Target, str]] = {}
    groups: list[_Target] = []
    for entry, plugin in targets:
        tensors = list({slot.tensor: None for slot in plugin.slots(entry.module)})
        keys = {tensor: weight_key(entry.module, tensor) or (entry.name, tensor) for tensor in tensors}
        shared = [tensor for tensor in tensors if keys[tensor] in owners]
        if not shared:
            group = _Target(entry, plugin)
            groups.append(group)
            owners.update({keys[tensor]: (group, tensor) for tensor in tensors})
            continue
        owner, source = owners[keys[shared[0]]]
        if len(tensors) > 1:
            raise TargetError(
                f"{entry.name!r} shares a weight with {owner.entry.name!r} and has others of its own. Exclude one of "
                "the two."
            )
        owner.ties.append((entry, Tie(entry.name, shared[0], source)))
    return groups


def _layers(
    config: LoraConfig, targets: list[tuple[NamedModule, LayerPlugin]], init: InitPlugin, variant: VariantPlugin | None
) -> list[tuple[NamedModule, PlannedLayer]]:
    names = [name for entry, _ in targets for name in entry.names]
    ranks = patterns.PatternMap("rank_pattern", config.rank_pattern, names)
    alphas = patterns.PatternMap("alpha_pattern", config.alpha_pattern, names)
    fused = patterns.PatternMap("fused_parts", config.fused_parts, names)
    planned: list[tuple[NamedModule, PlannedLayer]] = []
    refused: list[str] = []
    for target in _grouped(targets):
        entry, plugin = target.entry, target.plugin
        slots = _slots(entry, plugin, fused.get(target.names, []))
        reasons = _refusals(target, slots, init, config.dropout)
        reasons += [f"{entry.name!r}: {reason}" for reason in _variant_refusals(target, variant)]
        refused += reasons
        if reasons:
            continue
        r, alpha = ranks.get(target.names, config.r), alphas.get(target.names, config.alpha)
        layer = PlannedLayer(
            name=entry.name,
            aliases=entry.aliases,
            module_class=base_class_of(entry.module).__name__,
            plugin=plugin,
            branch_use=_branch_use(entry.module, plugin, variant),
            slots=slots,
            shapes=tuple(_shape(entry.module, plugin, slot) for slot in slots),
            r=r,
            alpha=alpha,
            scaling=alpha / (math.sqrt(r) if config.use_rslora else r),
            dropout=config.dropout,
            low_memory=config.memory == "low",
            variant=variant,
            ties=tuple(tie for _, tie in target.ties),
        )
        planned.append((entry, layer))
    if refused:
        raise TargetError("These layers cannot be adapted:\n  " + "\n  ".join(refused))
    return planned


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


def _branch_use(layer: nn.Module, plugin: LayerPlugin, variant: VariantPlugin | None = None) -> BranchUse:
    if class_path(base_class_of(layer)) not in {class_path(cls) for cls in plugin.branch_types}:
        return "never"
    # A variant forms its update in full; adding it to the weight is then one convolution or product instead of two.
    return "dropout" if variant and plugin.branch_use == "always" else plugin.branch_use


def _variant_refusals(target: _Target, variant: VariantPlugin | None) -> list[str]:
    if variant is None:
        return []
    if not isinstance(target.plugin, RowMajorPlugin):
        return [f"the variant {variant.name!r} needs a weight that has its outputs first; exclude the layer"]
    reason = variant.refusal(target.plugin)
    return [reason] if reason else []


def _refusals(target: _Target, slots: tuple[Slot, ...], init: InitPlugin, dropout: float) -> list[str]:
    """Why a layer, or one that is tied to it, cannot be adapted; empty if all can."""
    layers = {entry.name: entry.module for entry in (target.entry, *(entry for entry, _ in target.ties))}
    found = {name: _layer_refusal(layer, slots) for name, layer in layers.items()}
    own = target.entry.name
    found[own] = found[own] or _weight_refusal(target.entry.module, slots, init) or _input_refusal(target.plugin, init)
    reasons = [f"{name!r}: {reason}" for name, reason in found.items() if reason]
    if dropout and not reasons:
        # A tied layer forms the updated weight, which leaves no branch for dropout to act on.
        honors = _branch_use(target.entry.module, target.plugin) != "never" and not target.plugin.lookup
        reasons += [
            f"{name!r}: {base_class_of(layer).__name__} cannot honor dropout={dropout}; set dropout=0 or exclude it"
            for name, layer in layers.items()
            if not honors or layer is not target.entry.module
        ]
    return reasons


def _layer_refusal(layer: nn.Module, slots: tuple[Slot, ...]) -> str | None:
    if isinstance(layer, torch.jit.ScriptModule):
        return "it is a TorchScript module; adapt the Python module, before torch.jit.script"
    occupied = [name for slot in slots if hasattr(layer, name := f"lora_A{slot.suffix}")]
    if occupied and state_of(layer) is None:
        return f"it has an attribute {occupied[0]!r} already; remove the other LoRA library's adapter first"
    return None


def _weight_refusal(layer: nn.Module, slots: tuple[Slot, ...], init: InitPlugin) -> str | None:
    for slot in slots:
        computed = weight_key(layer, slot.tensor) is None
        if computed and init.changes_base:
            return f"{slot.tensor!r} is computed, so the init {init.name!r} cannot replace it"
        if computed and init.needs == "gradients":
            return f"{slot.tensor!r} is computed, so the init {init.name!r} cannot observe its gradient"
        weight = peek_weight(layer, slot.tensor)
        if not weight.dtype.is_floating_point:
            return f"{slot.tensor!r} has the type {weight.dtype}, not a floating one"
        if weight.is_meta:
            return f"{slot.tensor!r} is on the meta device; load its values first"
    return None


def _input_refusal(plugin: LayerPlugin, init: InitPlugin) -> str | None:
    if init.needs == "inputs" and type(plugin).inputs is LayerPlugin.inputs:
        return f"the layer type {plugin.name!r} does not say what its weight is multiplied by, which the init needs"
    return None


def _trained(
    config: LoraConfig,
    parameters: Mapping[str, Tensor],
    saved: set[str],
    layers: list[tuple[NamedModule, PlannedLayer]],
) -> list[str]:
    """Names of the model's own parameters to train, in the order of the model."""
    adapted = {full_name(layer.name, bias) for entry, layer in layers for bias in layer.plugin.biases(entry.module)}
    chosen: Mapping[str, Callable[[str], bool]] = {
        "none": lambda name: False,
        "all": lambda name: name.rpartition(".")[2] == "bias" or name.endswith("_bias"),
        "lora_only": lambda name: name in adapted,
    }
    is_bias = chosen[config.bias]
    return [
        name
        for name, parameter in parameters.items()
        if parameter.dtype.is_floating_point and (within(name, saved) or is_bias(name))
    ]
