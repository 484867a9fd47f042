"""What is lost where a merged weight is stored again in fewer bytes: with 4 bits, mostly all of the update."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lora_plugins.errors import MergeError, listing
from lora_plugins.inplace import StoredWeight, foreign_weights, full_name, layer_state, stored_weight
from lora_plugins.merge.weight_delta import place_of, weight_deltas


def check_storing(layers: Mapping[str, nn.Module], adapters: tuple[str, ...], max_error: float) -> None:
    """Checks that storing merged weights again loses no more of their updates than is allowed.

    Raises:
        MergeError: If more would be lost of one.
    """
    foreign = {
        full_name(name, tensor): kind
        for name, layer in layers.items()
        for tensor, kind in foreign_weights(layer).items()
        if tensor in layer_state(layer).weight_names
    }
    if foreign:
        raise MergeError(
            f"{listing(foreign)} is quantized by {next(iter(foreign.values())).title}, which is not written to. Merge "
            "into dense weights: merge_and_unload(dequantize=True); or leave the adapter unmerged."
        )
    lost = {name: _lost(stored, value) for name, stored, value in _merged(layers, adapters)}
    too_much = {name: share for name, share in lost.items() if not share <= max_error}
    if too_much:
        worst = max(too_much, key=lambda name: too_much[name])
        raise MergeError(
            f"Storing the merged weights again would lose {too_much[worst]:.0%} of the update of {worst!r}, and more "
            f"than {max_error:.0%} in {len(too_much)} of {len(lost)} stored weights. Merge into dense ones: "
            "merge_and_unload(dequantize=True); leave the adapter unmerged; or allow it with max_error."
        )


def _merged(layers: Mapping[str, nn.Module], adapters: tuple[str, ...]) -> Iterator[tuple[str, StoredWeight, Tensor]]:
    """Yields name, stored weight and merged value, one after the other."""
    seen: set[object] = set()
    for delta in weight_deltas(layers, adapters):
        stored = stored_weight(delta.layer, delta.tensor)
        if stored is not None:
            seen.add(place_of(delta.layer, delta.tensor))
            yield delta.name, stored, delta.effective()
    for name, layer in layers.items():
        for tensor, value in layer_state(layer).merged.items():
            stored = stored_weight(layer, tensor)
            if stored is not None and place_of(layer, tensor) not in seen:
                seen.add(place_of(layer, tensor))
                yield full_name(name, tensor), stored, value


def _lost(stored: StoredWeight, value: Tensor) -> float:
    """Returns the norm of what storing changes of a merged weight, over the norm of its update."""
    wide = torch.promote_types(value.dtype, torch.float32)
    update = float(torch.linalg.vector_norm(value.to(wide) - stored.dense().to(wide)))
    changed = float(torch.linalg.vector_norm(stored.storage.rounded(value).to(wide) - value.to(wide)))
    return changed / update if update else 0.0
