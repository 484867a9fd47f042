"""An adapter in the terms that foreign formats share: layers by name, each with A, B and an alpha."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from torch import Tensor

from lora_plugins.names import DEFAULT_ADAPTER

Value = TypeVar("Value", int, float)


def commonest(values: Iterable[Value]) -> Value:
    """Returns the value that occurs most often, the first of those."""
    ((value, _),) = Counter(values).most_common(1)
    return value


@dataclass(frozen=True)
class PortableLayer:
    """One adapted layer: its weight changes by `scaling * B @ A`, laid out like the weight.

    Args:
        A: `(r, in)`, or `(r, in, kernel...)` for a convolution; `(r, num_embeddings)` for an embedding.
        B: `(out, r)`, or `(out, r, 1...)` for a convolution; `(dim, r)` for an embedding.
        alpha: Numerator of the scaling.
        magnitude: DoRA's norms of the outputs, `(out,)`; None for plain LoRA.
        bias: A bias of B, `(out,)`, which is scaled like the update and added to the layer's; None for none.
        layer_type: Name of the layer type, such as `conv2d`; empty where the file does not tell.
        in_attention: Whether it is the output projection of an `nn.MultiheadAttention`.
    """

    A: Tensor
    B: Tensor
    alpha: float
    magnitude: Tensor | None = None
    layer_type: str = ""
    in_attention: bool = False
    bias: Tensor | None = None

    @property
    def r(self) -> int:
        """The rank."""
        return len(self.A)

    @property
    def outputs(self) -> int:
        """The number of outputs."""
        return len(self.B)

    def with_rows(self, rows: Callable[[Tensor], Tensor]) -> "PortableLayer":
        """Returns the layer with only those outputs that `rows` selects."""
        magnitude, bias = (None if each is None else rows(each) for each in (self.magnitude, self.bias))
        return replace(self, B=rows(self.B), magnitude=magnitude, bias=bias)

    @property
    def elements(self) -> int:
        """The number of elements of its tensors."""
        return sum(tensor.numel() for tensor in (self.A, self.B, self.magnitude, self.bias) if tensor is not None)


@dataclass(frozen=True)
class PortableAdapter:
    """An adapter that other libraries understand.

    Args:
        layers: The adapted layers by full name.
        values: Heads, biases and statistics by full name.
        name: Name of the adapter.
        use_rslora: Whether the scaling is `alpha / sqrt(r)` instead of `alpha / r`.
        dropout: Dropout of the branch in training.
        init: How it was started. It matters where the init changed the base, as `pissa` does.
        bias: Which biases were trained.
        saved_modules: Full names of the modules that were trained in full.
        details: What else a file says of it, for `lora-plugins inspect`.
        changes: What is added to the base's values of biases and weights of normalizations, by full name.
    """

    layers: Mapping[str, PortableLayer]
    values: Mapping[str, Tensor] = field(default_factory=dict)
    name: str = DEFAULT_ADAPTER
    use_rslora: bool = False
    dropout: float = 0.0
    init: str = "kaiming"
    bias: Literal["none", "all", "lora_only"] = "none"
    saved_modules: Sequence[str] = ()
    details: Mapping[str, str] = field(default_factory=dict)
    changes: Mapping[str, Tensor] = field(default_factory=dict)
