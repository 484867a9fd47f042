"""What files of adapters for diffusion pipelines share, those of diffusers and of the WebUI."""

import math
from collections.abc import Collection, Mapping
from dataclasses import replace

from lora_plugins.errors import AdapterFileError, counted, listing
from lora_plugins.formats.portable import PortableAdapter, PortableLayer
from lora_plugins.formats.portable_format import PortableFormat

_LAYER_TYPES = frozenset({"", "linear", "conv1d", "conv2d", "conv3d"})

_OTHER_METHODS: Mapping[str, str] = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "boft_": "BOFT",
    "on_input": "(IA)^3",
    "a1.weight": "GLoRA",
    "lambda_layer": "T-LoRA",
}
"""What the tensors of other methods than LoRA are called, or begin with, and the names of the methods."""


class PipelineFormat(PortableFormat):
    """A format of files for pipelines: of linear layers and convolutions, and nothing that is trained in full."""

    def refusals(self, adapter: PortableAdapter) -> list[str]:
        """Returns what such files have no form for."""
        return [
            *(
                f"{name!r}: a layer of type {layer.layer_type!r} has no form there"
                for name, layer in adapter.layers.items()
                if layer.layer_type not in _LAYER_TYPES
            ),
            *(
                f"{name!r}: the output projection of an attention, which no library calls by itself, has no form there"
                for name, layer in adapter.layers.items()
                if layer.in_attention
            ),
            *(f"{name!r}: what is trained in full has no form there" for name in adapter.values),
        ]


def without_rslora(adapter: PortableAdapter) -> Mapping[str, PortableLayer]:
    """Returns the layers with alphas that scale by `alpha / r`."""
    if not adapter.use_rslora:
        return adapter.layers
    return {name: replace(layer, alpha=layer.alpha * math.sqrt(layer.r)) for name, layer in adapter.layers.items()}


def refuse_keys(keys: Collection[str]) -> None:
    """Refuses keys of a file that have no place, if there are any.

    Raises:
        AdapterFileError: With the methods that they are of, and the keys.
    """
    methods = sorted({method for key in keys if (method := _other_method(key))})
    if methods:
        raise AdapterFileError(
            f"The adapter is of {listing(methods)}, which is another method than LoRA and has no form here: "
            f"{listing(sorted(keys), 3)}. Merge it into the model with the library that made it."
        )
    if keys:
        raise AdapterFileError(
            f"{counted(len(keys), 'key of the adapter has', 'keys of the adapter have')} no place: {listing(keys)}. If "
            "they are of what was trained besides LoRA, such as embeddings of tokens or weights of normalizations, "
            "which has no form here, take those keys out of the file to load the rest."
        )


def refuse_repeated(placed: Mapping[str, tuple[str, ...]]) -> None:
    """Refuses a file that has one tensor of a layer under several keys, such as in two spellings.

    Args:
        placed: By key, the layer that it is of and, last, the kind of tensor.

    Raises:
        AdapterFileError: With the keys.
    """
    keys: dict[tuple[str, ...], list[str]] = {}
    for key, (*layer, kind) in placed.items():
        keys.setdefault((*layer, "magnitude" if kind == "scale" else kind), []).append(key)
    repeated = next((own for own in keys.values() if len(own) > 1), None)
    if repeated:
        raise AdapterFileError(
            f"The adapter has one tensor of one layer under several keys, and it cannot be told which is meant: "
            f"{listing(sorted(repeated))}. Take all but one out of the file; if they are of several adapters, write "
            "each into a file of its own."
        )


def _other_method(key: str) -> str:
    """Returns the method that a tensor is of, by the end of its key; empty if it is unknown."""
    ends = {".".join(key.split(".")[-length:]) for length in (1, 2)}
    for word, method in _OTHER_METHODS.items():
        if word in ends or (word.endswith("_") and any(end.startswith(word) for end in ends)):
            return method
    return ""
