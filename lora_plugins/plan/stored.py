"""Which weights a config stores in fewer bytes, and how."""

import math
from collections.abc import Iterator, Sequence

from lora_plugins.config import LoraConfig
from lora_plugins.errors import TargetError, counted, listing, quoted
from lora_plugins.inplace import full_name
from lora_plugins.plan import patterns
from lora_plugins.plan.sites import Site, Survey, Weight
from lora_plugins.plugins import Storage


def stored_weights(
    config: LoraConfig,
    survey: Survey,
    targets: Sequence[Site],
    saved: set[str],
    storage: Storage | None,
    *,
    loading: bool = False,
) -> dict[str, Storage]:
    """Returns how weights are to be stored, by full name, those that are already stored so included.

    With `loading`, the values of weights without any are about to be loaded.

    Raises:
        TargetError: If a weight cannot be stored, or nothing would be.
    """
    if storage is None:
        return {}
    wanted = config.quantize_modules
    sites = targets if wanted is None else _chosen(wanted, survey, saved)
    least = storage.options["min_size"]
    large = {name: (site, weight) for name, site, weight in _weights(sites) if math.prod(weight.shape) >= least}
    refused = [f"{name!r}: {reason}" for name, found in large.items() if (reason := _reason(*found, storage, loading))]
    if refused:
        raise TargetError(
            f"These weights cannot be stored as {storage.plugin.name}; name others in quantize_modules:\n  "
            + "\n  ".join(refused)
        )
    if not large:
        raise TargetError(
            f"quantize={storage.plugin.name!r} stores nothing: all weights of {counted(len(sites), 'layer')} have "
            f"fewer than {least} elements. Name larger ones in quantize_modules, or set "
            "quantize_options={'min_size': ...}."
        )
    return dict.fromkeys(large, storage)


def _chosen(wanted: Sequence[str] | str, survey: Survey, saved: set[str]) -> list[Site]:
    free = [site for site in survey.outside(saved) if site.plugin]
    if wanted == "all":
        return free
    _check_patterns(wanted, survey, free)
    found = patterns.select("quantize_modules", wanted, [n for site in free for n in site.names])
    chosen = {name for matches in found.values() for name in matches}
    return [site for site in free if chosen & set(site.names)]


def _check_patterns(wanted: Sequence[str] | str, survey: Survey, free: Sequence[Site]) -> None:
    """Refuses a pattern that matches modules, and none whose weights can be stored."""
    storable = {name for site in free for name in site.names}
    served = {name for site in survey.sites if site.plugin for name in site.names}
    every = [name for site in survey.sites for name in site.names]
    for pattern, found in patterns.matches("quantize_modules", wanted, every).items():
        if not found or not storable.isdisjoint(found):
            continue
        trained = [name for name in found if name in served]
        why = (
            "modules_to_save trains in full and so keeps dense. Take it out of one of the two."
            if trained
            else f"no plugin adapts and none can store. {patterns.nearest(pattern, served)}"
        )
        raise TargetError(f"quantize_modules: {quoted(pattern)} matches {listing(trained or found)}, which {why}")


def _weights(sites: Sequence[Site]) -> Iterator[tuple[str, Site, Weight]]:
    for site in sites:
        if site.failure is not None:
            raise site.failure
        for tensor, weight in site.weights.items():
            yield full_name(site.name, tensor), site, weight


def _reason(site: Site, weight: Weight, storage: Storage, loading: bool) -> str:
    """Returns why a weight cannot be stored; empty where it can."""
    if weight.stored is not None:
        return "" if weight.stored.is_same(storage) else f"it is stored as {weight.stored} already"
    if weight.foreign:
        return f"it is quantized by {weight.foreign} already"
    if weight.computed:
        return "it is a buffer, or computed from other tensors"
    if not weight.dtype.is_floating_point:
        return f"it has the type {weight.dtype}, not a floating one"
    if weight.dtype.itemsize == 1:
        return f"it has 8 bits already, as {weight.dtype}"
    if weight.problem:
        return f"it {weight.problem}"
    if weight.on_meta and not loading:
        return "it is on the meta device; load its values first"
    if site.scripted:
        return "the layer is a TorchScript module"
    if site.fixed_class:
        return site.fixed_class
    if site.adapted:
        return "an adapter was trained on its float value; quantize with the first adapter"
    return ""
