"""The law, computed without lora_plugins: a fresh model whose weights are overwritten by `W + scaling * B @ A`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_weight_norm
from torch.nn.utils.weight_norm import WeightNorm
from transformers.pytorch_utils import Conv1D

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
LAYERS = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED, nn.Embedding, nn.MultiheadAttention, Conv1D, *RECURRENT)
"""The classes whose weights have to be adapted, subclasses included."""

INPUTS_FIRST = (*TRANSPOSED, nn.Embedding, Conv1D)
"""Layers whose weight is `(in, ...)`, so that its matrix is transposed."""


@dataclass(frozen=True)
class Update:
    """What LoRA adds to one weight: `scaling * B @ A`, with A (r, in) or a kernel, and B (out, r)."""

    layer: str
    tensor: str
    A: nn.Parameter
    B: nn.Parameter
    scaling: float

    @property
    def name(self) -> str:
        """Full name of the weight."""
        return f"{self.layer}.{self.tensor}".removeprefix(".")


def weights_of(layer: nn.Module) -> tuple[str, ...]:
    """Returns the attribute names of the weights of one of `LAYERS`."""
    if isinstance(layer, RECURRENT):  # the names in the layer's own order, of which adapters change none
        return tuple(name for name in layer._parameters if name.startswith("weight_"))
    if not isinstance(layer, nn.MultiheadAttention):
        return ("weight",)
    return ("in_proj_weight",) if layer._qkv_same_embed_dim else ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def expected_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields name and module of every layer that has to be adapted, a shared one once."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LAYERS))


def overwrite(model: nn.Module, updates: Sequence[Update]) -> Mapping[str, nn.Parameter]:
    """Adds the updates to the weights of a fresh model and lets every parameter require a gradient.

    Weights that something computes (weight norm) become plain parameters first; a tied weight changes once.

    Returns:
        The weights by full name.
    """
    found: dict[str, nn.Parameter] = {}
    changed: set[int] = set()
    for update in updates:
        layer = model.get_submodule(update.layer)
        parameter = _plain(layer, update.tensor)
        found[update.name] = parameter
        if id(parameter) not in changed:
            changed.add(id(parameter))
            with torch.no_grad():
                parameter.add_(_delta(layer, update, parameter.shape))
    model.requires_grad_(True)
    return found


def factor_gradients(layer: nn.Module, update: Update, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of A and B as matrices, by the chain rule, from that of the weight."""
    A, B = update.A.detach().flatten(1), update.B.detach().flatten(1)
    G = gradient.to_dense().flatten(1)
    G = G.T if isinstance(layer, INPUTS_FIRST) else G
    return update.scaling * B.T @ G, update.scaling * G @ A.T


def _delta(layer: nn.Module, update: Update, shape: torch.Size) -> Tensor:
    A, B = update.A.flatten(1), update.B.flatten(1)
    if len(A) != B.shape[1] or len(B) * A.shape[1] != shape.numel():
        raise ValueError(f"A {list(A.shape)} and B {list(B.shape)} do not make a weight {list(shape)} of {update.name}")
    matrix = update.scaling * (B @ A)
    return (matrix.T if isinstance(layer, INPUTS_FIRST) else matrix).reshape(shape)


def _plain(layer: nn.Module, tensor: str) -> nn.Parameter:
    if parametrize.is_parametrized(layer, tensor):
        parametrize.remove_parametrizations(layer, tensor, leave_parametrized=True)
    if any(isinstance(hook, WeightNorm) and hook.name == tensor for hook in layer._forward_pre_hooks.values()):
        remove_weight_norm(layer, tensor)
    return layer.get_parameter(tensor)
