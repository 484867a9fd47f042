"""`nn.MultiheadAttention`: the projections of query, key and value that it keeps as bare weights.

Its output projection is a Linear child of its own and is adapted as one: the attention reads `out_proj.weight`,
which answers with the updated weight. Where dropout acts, or rows have adapters of their own, it is called.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_plugins.layers.linear import mixed_product, product, thirds
from lora_plugins.plugins import BranchUse, RowMajorPlugin, Slot, StackedAdapters, Term

_SEPARATE = {"q": "q_proj_weight", "k": "k_proj_weight", "v": "v_proj_weight"}

Attended = tuple[Tensor, Tensor | None]
"""What an attention returns: its output, and its weights where they were asked for."""


class MultiheadAttentionPlugin(RowMajorPlugin[nn.MultiheadAttention]):
    """`torch.nn.MultiheadAttention`, with one width for query, key and value or with three."""

    name = "multihead_attention"
    module_type = nn.MultiheadAttention
    branch_types: ClassVar = (nn.MultiheadAttention,)
    branch_use: ClassVar[BranchUse] = "dropout"
    branch_takes_delta = True

    def slots(self, layer: nn.MultiheadAttention) -> Sequence[Slot]:
        """Returns one slot over the fused projection, or one for each separate projection."""
        if layer._qkv_same_embed_dim:
            return (Slot("in_proj_weight"),)
        return tuple(self.parts(layer).values())

    def parts(self, layer: nn.MultiheadAttention) -> Mapping[str, Slot]:
        """Returns the thirds of the fused projection, or the separate projections."""
        if layer._qkv_same_embed_dim:
            return thirds("in_proj_weight", 3 * layer.embed_dim)
        return {part: Slot(tensor, part) for part, tensor in _SEPARATE.items()}

    def biases(self, layer: nn.MultiheadAttention) -> Sequence[str]:
        """Returns the name of the bias of the three projections."""
        return ("in_proj_bias",)

    def inputs(
        self,
        layer: nn.MultiheadAttention,
        slot: Slot,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Returns the rows of what the slot projects: of all three for the fused one, once where they are the same."""
        given = {"q": query, "k": key, "v": value}
        seen = [given[slot.part]] if slot.part else list({id(x): x for x in given.values()}.values())
        return torch.cat([x.flatten(0, -2) for x in seen])

    def branch(
        self,
        layer: nn.MultiheadAttention,
        base: Mapping[str, Tensor],
        terms: Sequence[Term],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Attended:
        """Projects query, key and value with their updates, attends, and calls the output projection."""
        inputs = (query, key, value)
        if layer._qkv_same_embed_dim:
            weight, bias = base["in_proj_weight"], layer.in_proj_bias
            projected = _thirds_of(layer, inputs, lambda x: product(x, weight, bias, terms))
        else:
            projected = _separate(layer, base, terms, inputs)
        output, weights = _attend(layer, projected, *args, **kwargs)
        return _project(layer, output), weights

    def mixed(
        self,
        layer: nn.MultiheadAttention,
        base: Mapping[str, Tensor],
        adapters: StackedAdapters,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Attended:
        """Projects each row of the batch with its own small matrices, all rows at once."""
        if query.dim() < 3:
            raise NotImplementedError("An attention mixes the adapters of batches, and this input has no batch.")
        weight, bias = base["in_proj_weight"], layer.in_proj_bias
        projected = _thirds_of(layer, (query, key, value), lambda x: mixed_product(x, weight, bias, adapters))
        output, weights = _attend(layer, projected, *args, **kwargs)
        return _project(layer, output), weights

    def mixing_problem(self, layer: nn.MultiheadAttention) -> str:
        """Returns why rows cannot be mixed: the batch does not come first, or each of three weights projects."""
        if not layer.batch_first:
            return "with batch_first=False, the first dimension is no batch"
        return "" if layer._qkv_same_embed_dim else "query, key and value have a weight each"


def _project(layer: nn.MultiheadAttention, output: Tensor) -> Tensor:
    """Projects the output as torch does, by the weight of a layer whose hooks and own forward do not count.

    Where its forward is that of a linear layer, it is called, for dropout and rows with adapters of their own.
    """
    linear: Any = layer.out_proj
    if _is_plain(type(linear)):
        projected: Tensor = linear.forward(output)
        return projected
    return F.linear(output, linear.weight, linear.bias)


def _is_plain(cls: Any) -> bool:
    """Whether a class, or the one that an adapted layer's was generated from, has the forward of a linear layer."""
    forward = cls.forward
    while hasattr(forward, "__wrapped__"):  # compilers do not follow inspect.unwrap
        forward = forward.__wrapped__
    return forward is nn.Linear.forward


def _thirds_of(
    layer: nn.MultiheadAttention, inputs: Sequence[Tensor], project: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Projects to all three at once and takes the part of each; an input that is given repeatedly is projected once."""
    outputs: list[Tensor] = []
    for x in inputs:
        same = [y for other, y in zip(inputs[: len(outputs)], outputs, strict=True) if other is x]
        outputs.append(same[0] if same else project(x))
    return [y.narrow(-1, i * layer.embed_dim, layer.embed_dim) for i, y in enumerate(outputs)]


def _separate(
    layer: nn.MultiheadAttention, base: Mapping[str, Tensor], terms: Sequence[Term], inputs: Sequence[Tensor]
) -> list[Tensor]:
    """Projects by three weights, of which only those with an update are in `base`."""
    biases = (None, None, None) if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
    outputs = []
    for x, tensor, bias in zip(inputs, _SEPARATE.values(), biases, strict=True):
        own = [term for term in terms if term.slot.tensor == tensor]
        outputs.append(product(x, base[tensor], bias, own) if own else F.linear(x, getattr(layer, tensor), bias))
    return outputs


def _attend(
    layer: nn.MultiheadAttention,
    projected: Sequence[Tensor],
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Attended:
    """Lets torch attend between projections, with all of its options: its own products are with the identity."""
    swapped = layer.batch_first and projected[0].dim() == 3
    query, key, value = (x.transpose(0, 1) if swapped else x for x in projected)
    same = torch.eye(layer.embed_dim, dtype=query.dtype, device=query.device)
    output, weights = F.multi_head_attention_forward(
        query, key, value, layer.embed_dim, layer.num_heads, None, None, layer.bias_k, layer.bias_v,
        layer.add_zero_attn, layer.dropout, same, None,
        training=layer.training, key_padding_mask=key_padding_mask, need_weights=need_weights, attn_mask=attn_mask,
        use_separate_proj_weight=True, q_proj_weight=same, k_proj_weight=same, v_proj_weight=same,
        average_attn_weights=average_attn_weights, is_causal=is_causal,
    )  # fmt: skip
    return output.transpose(0, 1) if swapped else output, weights
