"""Linear layers: y = x Wᵀ + b, with W of shape (out, in); and their transposed twin in transformers."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_plugins.kernels import linear_2d, lora_linear, lora_rescaled
from lora_plugins.plugins import (
    BranchUse,
    ColumnMajorPlugin,
    RowMajorPlugin,
    Slot,
    StackedAdapters,
    Term,
    add_updates,
    joined,
)
from lora_plugins.utils import autocast_dtype


def thirds(tensor: str, rows: int) -> dict[str, Slot]:
    """Splits a weight of `rows` rows into equal slots for q, k and v; empty if they do not divide."""
    if rows % 3:
        return {}
    size = rows // 3
    return {part: Slot(tensor, part, (i * size, (i + 1) * size, rows)) for i, part in enumerate("qkv")}


def _is_matrix(weight: Tensor) -> bool:
    """Whether a weight is a plain matrix of floating-point numbers, and of no class that stores fewer bytes."""
    return type(weight) is nn.Parameter and weight.dim() == 2 and weight.is_floating_point()


def _update(x: Tensor, term: Term) -> Tensor:
    """Returns `scaling * dropout(x) Aᵀ Bᵀ`, of an `x` of `(..., in)`."""
    x = term.drop(x)
    # A half-precision base keeps its adapter in float32; autocast, where active, chooses the type itself.
    x = x.to(term.A.dtype) if autocast_dtype(x) is None else x
    delta = term.delta
    update = F.linear(F.linear(x, term.A), term.B) * term.scaling if delta is None else F.linear(x, delta)
    if term.slot.rows is None:
        return update
    start, stop, total = term.slot.rows
    return F.pad(update, (start, total - stop))


def product(x: Tensor, weight: Tensor, bias: Tensor | None, terms: Sequence[Term]) -> Tensor:
    """Computes `x Wᵀ + b` and adds the terms; x is `(..., in)`, W is `(out, in)`."""
    if (rescaling := terms[0].rescaling) is not None:
        return lora_rescaled(x, weight, bias, terms[0], rescaling, None)
    joint = joined(terms)
    if joint is not None:
        return lora_linear(x, weight, bias, joint)
    rows = x.flatten(0, -2) if x.dim() > 2 and not x.is_nested else x  # whose gradients are no views
    updates = [_update(rows, term) for term in terms]
    y = add_updates(F.linear(rows, weight, bias), updates)
    return y if rows.dim() == x.dim() else y.view(*x.shape[:-1], len(weight))


def mixed_product(x: Tensor, weight: Tensor, bias: Tensor | None, adapters: StackedAdapters) -> Tensor:
    """Multiplies each row of a batch with its own small matrices, all rows at once; x is `(batch, ..., in)`."""
    A, B = adapters.A[adapters.index], adapters.B[adapters.index]
    rows = x.reshape(-1, x.shape[-1])
    update = torch.bmm(torch.bmm(A, rows.view(len(x), -1, x.shape[-1]).to(A.dtype).mT).mT, B.mT)
    added = bias if adapters.factors is None else None  # which has no factor
    if autocast_dtype(x) is None:
        y = linear_2d(rows, weight, added).view(*x.shape[:-1], len(weight))
    else:
        y = F.linear(x, weight, added)
    return adapters.rescale(y.add_(update.view(y.shape)), bias, -1)


class LinearPlugin(RowMajorPlugin[nn.Linear]):
    """`torch.nn.Linear` and its subclasses."""

    name = "linear"
    module_type = nn.Linear
    branch_types: ClassVar = (
        nn.Linear,
        "timm.layers.linear.Linear",
        "bitsandbytes.nn.modules.Linear4bit",
        "diffusers.quantizers.gguf.utils.GGUFLinear",
        "bitsandbytes.nn.modules.Linear8bitLt",
    )
    branch_use: ClassVar[BranchUse] = "always"
    branch_takes_delta = True
    branch_takes_rescaling = True
    function = F.linear

    def parts(self, layer: nn.Linear) -> Mapping[str, Slot]:
        """Returns equal thirds of the output rows, the layout of timm's and torch's fused projections."""
        weight = layer._parameters.get("weight")
        # A weight that was replaced by hand, as that of a head for fewer classes, has other rows than the layer says;
        # one that is stored in fewer bytes or in shards has a shape of its own.
        is_own_shape = weight is not None and (weight.shape[1:] == (layer.in_features,) or _is_matrix(weight))
        return thirds("weight", len(weight) if weight is not None and is_own_shape else layer.out_features)

    def inputs(self, layer: nn.Linear, slot: Slot, x: Tensor) -> Tensor:
        """Returns the rows of `x`, which is `(..., in)`."""
        return x.flatten(0, -2) if x.dim() > 1 else x[None]

    def branch(self, layer: nn.Linear, base: Mapping[str, Tensor], terms: Sequence[Term], x: Tensor) -> Tensor:
        """Computes `x Wᵀ + b` and adds the terms; x is `(..., in)`."""
        return product(x, base["weight"], layer.bias, terms)

    def mixed(self, layer: nn.Linear, base: Mapping[str, Tensor], adapters: StackedAdapters, x: Tensor) -> Tensor:
        """Multiplies each row with its own small matrices, all rows at once."""
        return mixed_product(x, base["weight"], layer.bias, adapters)


class TransformersConv1DPlugin(ColumnMajorPlugin[Any]):
    """`Conv1D` of transformers: a linear layer whose weight is `(in, out)`."""

    name = "transformers_conv1d"
    module_type = "transformers.pytorch_utils.Conv1D"
    branch_types: ClassVar = ("transformers.pytorch_utils.Conv1D",)
    branch_use: ClassVar[BranchUse] = "always"
    branch_takes_delta = True
    branch_takes_rescaling = True

    def parts(self, layer: Any) -> Mapping[str, Slot]:
        """Returns equal thirds of the outputs, as attention layers split them."""
        return thirds("weight", layer.nf)

    def inputs(self, layer: Any, slot: Slot, x: Tensor) -> Tensor:
        """Returns the rows of `x`, which is `(..., in)`."""
        return x.reshape(-1, x.shape[-1])

    def branch(self, layer: Any, base: Mapping[str, Tensor], terms: Sequence[Term], x: Tensor) -> Tensor:
        """Computes `x W + b` and adds the terms; x is `(..., in)`."""
        return product(x, base["weight"].T, layer.bias, terms)

    def mixed(self, layer: Any, base: Mapping[str, Tensor], adapters: StackedAdapters, x: Tensor) -> Tensor:
        """Multiplies each row with its own small matrices, all rows at once."""
        return mixed_product(x, base["weight"].T, layer.bias, adapters)
