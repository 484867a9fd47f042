"""Why a layer cannot be adapted as a config asks: pure questions about what the survey found."""

from lora_plugins.errors import noted
from lora_plugins.plan.sites import Site
from lora_plugins.plan.ties import Target
from lora_plugins.plugins import BranchUse, InitPlugin, LayerPlugin, Slot, VariantPlugin, class_path


def branch_use(site: Site, variant: VariantPlugin | None) -> BranchUse:
    """Returns when the plugin's branch replaces the layer's own forward."""
    plugin = site.plugin
    if plugin is None or {class_path(cls) for cls in plugin.branch_types}.isdisjoint(site.computes_as):
        return "never"
    if variant is None:
        return plugin.branch_use
    if not plugin.branch_takes_delta:
        return "never"
    # A variant forms its update in full; adding it to the weight is then one convolution or product instead of two.
    # Rows that are looked up are fewer than those that would be added.
    return "dropout" if plugin.branch_use == "always" and not plugin.lookup else plugin.branch_use


def tied_use(site: Site, owner: Site, variant: VariantPlugin | None) -> BranchUse:
    """Returns when the plugin's branch replaces the forward of a layer that shares the weight of another one.

    One of another plugin, as the embedding whose weight is that of a linear layer, needs the effective weight: a branch
    knows only its own layer's use of it.
    """
    return branch_use(site, variant) if site.plugin is owner.plugin else "never"


def reasons(
    target: Target,
    slots: tuple[Slot, ...],
    init: InitPlugin,
    variant: VariantPlugin | None,
    dropout: float,
    *,
    restoring: bool = False,
) -> list[str]:
    """Returns why a layer, or one that is tied to it, cannot be adapted; empty if all can.

    With `restoring`, the adapter's tensors are there already, so that the init does not start them.
    """
    site = target.site
    found = {other.name: _layer_reason(other, slots) for other in target.sites}
    found[site.name] = found[site.name] or _weight_reason(site, slots, init, restoring) or _input_reason(site, init)
    texts = [f"{name!r}: {reason}" for name, reason in found.items() if reason]
    if dropout and not texts:
        of_variant = f" with the variant {variant.name!r}" if variant else ""
        cannot = f"cannot honor dropout={dropout}{of_variant}; set dropout=0 or exclude"
        if site.plugin is None or site.plugin.lookup or branch_use(site, variant) == "never":
            texts.append(f"{site.name!r}: {site.class_name} {cannot} it")
        texts += [
            f"{other.name!r}: it shares the weight of {site.name!r}, and {cannot} both"
            for other, _ in target.ties
            if tied_use(other, site, variant) == "never"
        ]
    if variant is not None and (reason := _variant_reason(site, variant)):
        texts.append(f"{site.name!r}: {reason}")
    return texts


def _layer_reason(site: Site, slots: tuple[Slot, ...]) -> str:
    if site.scripted:
        return "it is a TorchScript module; adapt the Python module, before torch.jit.script"
    if site.fixed_class:
        return site.fixed_class
    occupied = [name for slot in slots if (name := f"lora_A{slot.suffix}") in site.foreign]
    if occupied:
        return f"it has an attribute {occupied[0]!r} already; remove the other LoRA library's adapter first"
    return ""


def _weight_reason(site: Site, slots: tuple[Slot, ...], init: InitPlugin, restoring: bool) -> str:
    for slot in slots:
        weight = site.weights[slot.tensor]
        if weight.computed and init.changes_base:
            return f"{slot.tensor!r} is a buffer, or computed, so the init {init.name!r} cannot replace it"
        if weight.computed and init.needs == "gradients":
            return f"{slot.tensor!r} is a buffer, or computed, so the init {init.name!r} cannot observe its gradient"
        how = weight.foreign and f"quantized by {weight.foreign}"
        how = how if weight.stored is None else f"stored as {weight.stored.plugin.name}"
        if how and not restoring and (init.changes_base or init.needs == "gradients"):
            return (
                f"{slot.tensor!r} is {how} already, so the init {init.name!r} cannot "
                "start from its float value; adapt the float model, with quantize in the config"
            )
        if not weight.dtype.is_floating_point:
            return f"{slot.tensor!r} has the type {weight.dtype}, not a floating one"
        if weight.problem:
            return f"{slot.tensor!r} {weight.problem}"
        if weight.on_meta:
            return f"{slot.tensor!r} is on the meta device; load its values first"
    return ""


def _input_reason(site: Site, init: InitPlugin) -> str:
    if init.needs == "inputs" and site.plugin and type(site.plugin).inputs is LayerPlugin.inputs:
        return (
            f"the layer type {site.plugin.name!r} does not say what its weight is multiplied by, which the init needs"
        )
    return ""


def _variant_reason(site: Site, variant: VariantPlugin) -> str:
    plugin = site.plugin
    if plugin is None or not plugin.rows_are_outputs:
        return f"the variant {variant.name!r} needs a row of the weight's matrix for each output; exclude the layer"
    with noted(f"refusal() of the variant {variant.name!r}, for {site.name!r}"):
        reason = variant.refusal(plugin)
    return f"the variant {variant.name!r} refuses {plugin.name!r}: {reason}" if reason else ""
