"""Makes the plan of an adapter: every decision about a model, made and checked before anything is touched.

`survey` walks the model; `planned` decides, as a function of the records that it makes (`sites`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from lora_plugins.config import LayerSettings, LoraConfig
from lora_plugins.errors import TargetError, listing, near
from lora_plugins.inplace import full_name
from lora_plugins.plan import checks
from lora_plugins.plan.named import named_plugins, storage_of
from lora_plugins.plan.pattern_map import PatternMap
from lora_plugins.plan.plan import Plan
from lora_plugins.plan.renamings import with_current_names
from lora_plugins.plan.sites import Site, Survey
from lora_plugins.plan.stored import stored_weights
from lora_plugins.plan.survey import survey
from lora_plugins.plan.targets import left_out, saved_modules, target_sites
from lora_plugins.plan.ties import Target, grouped
from lora_plugins.plugins import LAYERS, InitPlugin, PlannedLayer, Registry, Slot, Storage, VariantPlugin, registry_of
from lora_plugins.utils import within


def make_plan(model: nn.Module, config: LoraConfig, registry: Registry | None, *, restoring: bool = False) -> Plan:
    """Decides what an adapter would do to a model; touches nothing.

    Args:
        model: Any module, adapted already or not.
        config: The configuration of the adapter.
        registry: The layer types and inits there are; by default those of the plugins that the config lets load.
        restoring: Whether the adapter's tensors are there already, so that its init does not start them, and how
            weights are stored is known.

    Raises:
        TargetError: If a parameter has no shape yet, a pattern matches nothing, two of them tie, or a targeted layer
            cannot be served.
        PluginError: As `named_plugins` does.
        ConfigError: Likewise.
    """
    registry = registry or registry_of(config)
    init, variant, storage = named_plugins(config, registry, restoring=restoring)
    found = survey(model, registry)
    current = with_current_names(model, config)
    plan = planned(found, current, registry, init, variant, storage, restoring=restoring)
    return plan if current is config else replace(plan, config=config)


def weights_to_store(model: nn.Module, config: LoraConfig, registry: Registry) -> dict[str, Storage]:
    """Returns by full name how the weights of a model are to be stored that has no values yet, nor an adapter.

    Raises:
        TargetError: As `make_plan` does.
    """
    found = survey(model, registry)
    _check_shapes(found)
    current = with_current_names(model, config)
    saved = saved_modules(current, found)
    targets = target_sites(current, found, registry, saved)
    return stored_weights(current, found, targets, saved, storage_of(current, registry), loading=True)


def planned(
    survey: Survey,
    config: LoraConfig,
    registry: Registry,
    init: InitPlugin,
    variant: VariantPlugin | None,
    storage: Storage | None = None,
    *,
    restoring: bool = False,
) -> Plan:
    """Decides what an adapter would do to a surveyed model, with the plugins that its config names; see `make_plan`.

    Raises:
        TargetError: As `make_plan` does.
    """
    _check_shapes(survey)
    _check_backward(survey)
    saved = saved_modules(config, survey)
    targets = target_sites(config, survey, registry, saved)
    layers = _layers(config, targets, init, variant, restoring=restoring)
    trained = _trained(config, survey, saved, targets)
    stored = stored_weights(config, survey, targets, saved, storage)
    _check_trained(survey, trained, layers)
    norms = [site.name for site in survey.sites if site.has_statistics and not within(site.name, saved)]
    tracked = set(norms) if config.norm == "track" else set()
    return Plan(
        config=config,
        init=init,
        layers=tuple(layer for _, layer in layers),
        trained=tuple(trained),
        saved_buffers=tuple(name for name in survey.buffers if within(name, saved) or within(name, tracked)),
        frozen_norms=tuple(name for name in norms if name not in tracked),
        base_parameters=sum(parameter.size for parameter in survey.parameters.values()),
        trained_parameters=sum(survey.parameters[name].size for name in trained),
        left_out=left_out(config, survey, saved, registry.failed()),
        layer_types=tuple(sorted(registry.of(LAYERS))),
        stored=stored,
    )


def _check_shapes(survey: Survey) -> None:
    lazy = [name for name, parameter in survey.parameters.items() if parameter.lazy]
    if lazy:
        raise TargetError(f"{listing(lazy)} has no shape yet. Run the model once on a batch, then adapt it.")


def _check_backward(survey: Survey) -> None:
    """Refuses layers through which no gradient could go, adapted or not."""
    broken = [
        f"{full_name(site.name, name)!r} {weight.problem}"
        for site in survey.sites
        for name, weight in site.weights.items()
        if weight.breaks
    ]
    if broken:
        raise TargetError("The model cannot be trained:\n  " + "\n  ".join(broken))


def _layers(
    config: LoraConfig, sites: Sequence[Site], init: InitPlugin, variant: VariantPlugin | None, *, restoring: bool
) -> list[tuple[Site, PlannedLayer]]:
    failure = next((site.failure for site in sites if site.failure is not None), None)
    if failure is not None:
        raise failure
    names = [name for site in sites for name in site.names]
    ranks = PatternMap("rank_pattern", config.rank_pattern, names)
    alphas = PatternMap("alpha_pattern", config.alpha_pattern, names)
    fused = PatternMap("fused_parts", config.fused_parts, names, at_end=True)
    layers: list[tuple[Site, PlannedLayer]] = []
    refused: list[str] = []
    for target in grouped(sites):
        slots = _slots(target.site, fused.get(target.names, []))
        reasons = checks.reasons(target, slots, init, variant, config.dropout, restoring=restoring)
        refused += reasons
        if not reasons:
            r, alpha = ranks.get(target.names, config.r), alphas.get(target.names, config.alpha)
            layers.append((target.site, _layer(target, slots, LayerSettings.of(config, r, alpha), variant)))
    if refused:
        raise TargetError("These layers cannot be adapted:\n  " + "\n  ".join(refused))
    return layers


def _layer(
    target: Target, slots: tuple[Slot, ...], settings: LayerSettings, variant: VariantPlugin | None
) -> PlannedLayer:
    site = target.site
    assert site.plugin is not None  # of a target
    return PlannedLayer(
        name=site.name,
        aliases=site.names[1:],
        module_class=site.class_name,
        plugin=site.plugin,
        branch_use=checks.branch_use(site, variant),
        slots=slots,
        shapes=tuple(_shape(site, slot) for slot in slots),
        settings=settings,
        variant=variant,
        ties=tuple(replace(tie, branch_use=checks.tied_use(other, site, variant)) for other, tie in target.ties),
    )


def _slots(site: Site, wanted: list[str]) -> tuple[Slot, ...]:
    for part in wanted:
        if part not in site.parts:
            reason = near(part, site.parts) if site.parts else f"A {site.class_name} of its size has no parts."
            raise TargetError(f"fused_parts: {site.name!r} has no part {part!r}. {reason}")
    return tuple(site.parts[part] for part in site.parts if part in wanted) if wanted else site.slots


def _shape(site: Site, slot: Slot) -> tuple[int, int]:
    rows, columns = site.weights[slot.tensor].shape
    return (slot.rows[1] - slot.rows[0] if slot.rows else rows), columns


def _trained(config: LoraConfig, survey: Survey, saved: set[str], targets: Sequence[Site]) -> list[str]:
    """Names of the model's own parameters to train, in the order of the model.

    Raises:
        TargetError: If `modules_to_save` or `bias` names one that cannot be trained.
    """
    adapted = {full_name(site.name, bias) for site in targets for bias in site.biases}
    known = {full_name(site.name, bias) for site in survey.sites for bias in site.biases}
    chosen: Mapping[str, Callable[[str], bool]] = {
        "none": lambda name: False,
        "all": lambda name: name.rpartition(".")[2] == "bias" or name.endswith("_bias") or name in known,
        "lora_only": lambda name: name in adapted,
    }
    is_bias = chosen[config.bias]
    unfit = [
        f"{name} of {parameter.dtype}"
        for name, parameter in survey.parameters.items()
        for each in (name, *parameter.aliases)
        if not parameter.floating and (within(each, saved) or (parameter.dtype.is_complex and is_bias(each)))
    ]
    if unfit:
        raise TargetError(
            f"modules_to_save or bias names parameters that cannot be trained: {listing(dict.fromkeys(unfit))}. Take "
            "them out. Those of integers are of quantized layers: load the model with these layers left out of its "
            "quantization, as by BitsAndBytesConfig(llm_int8_skip_modules=[...]) of transformers, or unquantized; "
            "complex ones are not served."
        )
    return [
        name
        for name, parameter in survey.parameters.items()
        if parameter.floating and any(within(each, saved) or is_bias(each) for each in (name, *parameter.aliases))
    ]


def _check_trained(survey: Survey, trained: Sequence[str], layers: Sequence[tuple[Site, PlannedLayer]]) -> None:
    adapted = {site.weights[slot.tensor].key for site, layer in layers for slot in layer.slots}
    for name in trained:
        if survey.parameters[name].key in adapted:
            raise TargetError(
                f"{name!r} would be trained in place and is also the weight of an adapted layer. Take it out of "
                "modules_to_save, or add the layer to exclude_modules."
            )
