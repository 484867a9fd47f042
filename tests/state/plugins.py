"""A layer type and a variant of a third party, as the documentation teaches to write them."""

import functools

import torch
from torch import nn
from torch.nn import functional as F

from lora_plugins import RowMajorPlugin, VariantPlugin, hookimpl
from lora_plugins.plugins import build_registry


class BilinearPlugin(RowMajorPlugin):
    """The tutorial's: as a matrix the weight is (out, in1 * in2)."""

    name = "bilinear"
    module_type = nn.Bilinear
    branch_types = (nn.Bilinear,)
    branch_use = "always"

    def branch(self, layer, base, terms, x1, x2):
        y = F.bilinear(x1, x2, base["weight"], layer.bias)
        for term in terms:
            forms = term.A.unflatten(1, base["weight"].shape[1:])
            dtype = forms.dtype
            mixed = F.linear(F.bilinear(term.drop(x1).to(dtype), x2.to(dtype), forms), term.B)
            y = y + (term.scaling * mixed).to(y.dtype)
        return y


class GatedVariant(VariantPlugin):
    """The whole update of a layer times one learned number."""

    name = "gated"

    def shapes(self, rows, columns, r):
        return {"gate": (1,)}

    def first_values(self, weight, A, B, scaling):
        return {"gate": torch.ones(1)}

    def delta_weight(self, weight, A, B, scaling, own):
        return own["gate"] * scaling * (B @ A)


class ThirdParty:
    """The hooks of the package that both come from."""

    @hookimpl
    def lora_plugins_register_layers(self, registrar):
        registrar.add(BilinearPlugin())

    @hookimpl
    def lora_plugins_register_variants(self, registrar):
        registrar.add(GatedVariant())


@functools.cache
def registry():
    """The registry with the third party's plugins beside the built-in ones."""
    return build_registry([("third_party", ThirdParty())])
