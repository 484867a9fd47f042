"""Bilinear layers: y = x1 W x2 + b for each output, with W of shape (out, in1, in2)."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from lora_plugins import RowMajorPlugin, Slot, Term


class BilinearPlugin(RowMajorPlugin[nn.Bilinear]):
    """`torch.nn.Bilinear`. As a matrix its weight is (out, in1 * in2), so A is (r, in1 * in2) and B is (out, r)."""

    name = "bilinear"
    module_type = nn.Bilinear
    branch_types = (nn.Bilinear,)
    branch_use = "always"

    def inputs(self, layer: nn.Bilinear, slot: Slot, x1: Tensor, x2: Tensor) -> Tensor:
        """The products of all pairs, `(n, in1 * in2)`: what the rows of the matrix are multiplied by."""
        return (x1.unsqueeze(-1) * x2.unsqueeze(-2)).flatten(-2).flatten(0, -2)

    def branch(
        self, layer: nn.Bilinear, base: Mapping[str, Tensor], terms: Sequence[Term], x1: Tensor, x2: Tensor
    ) -> Tensor:
        """Computes r bilinear forms with A in place of `out` with ΔW, and mixes them by B."""
        y = F.bilinear(x1, x2, base["weight"], layer.bias)
        for term in terms:
            forms = term.A.view(-1, *base["weight"].shape[1:])
            dtype = forms.dtype
            mixed = F.linear(F.bilinear(term.drop(x1).to(dtype), x2.to(dtype), forms), term.B)
            y = y + (term.scaling * mixed).to(y.dtype)
        return y
