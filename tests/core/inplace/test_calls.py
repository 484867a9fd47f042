"""How adapted layers may be called: by whatever names their own forward has."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_plugins import LoraConfig, LoraModel, RowMajorPlugin
from tests.core.registries import registry_of


class Named(nn.Linear):
    """Has parameters that are called as those of the methods around its forward."""

    def forward(self, x, layer=1.0, compute=1.0, module=1.0):
        return super().forward(x) * layer * compute * module


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5))

    def forward(self, *, x, factor=1.0):
        return F.linear(x, self.weight) * factor


class ByKeywordPlugin(RowMajorPlugin):
    name, module_type = "by_keyword", ByKeyword
    branch_types, branch_use = (ByKeyword,), "always"

    def branch(self, layer, base, terms, *, x, factor=1.0):
        y = F.linear(x, base["weight"])
        for term in terms:
            y = y + F.linear(F.linear(term.drop(x), term.A), term.B) * term.scaling
        return y * factor

    def mixed(self, layer, base, adapters, *, x, factor=1.0):
        A, B = adapters.A[adapters.index], adapters.B[adapters.index]
        return (F.linear(x, base["weight"]) + (B @ A @ x[..., None])[..., 0]) * factor


def merged_output(lora, *args, **kwargs):
    with torch.no_grad():
        lora.merge_adapter(max_error=1.0)
        output = lora.model.eval()[0](*args, **kwargs)
        lora.unmerge_adapter()
    return output


@pytest.mark.parametrize("stored", [{}, {"quantize": "int8", "quantize_options": {"min_size": 0}}], ids=str)
@pytest.mark.parametrize("name", ["layer", "compute", "module"])
def test_a_parameter_of_the_forward_has_any_name(name, stored):
    lora = LoraModel(nn.Sequential(Named(5, 4)).double(), LoraConfig(r=2, init="none", **stored))
    x = torch.randn(3, 5).double()
    output = lora.model[0](x, **{name: 2.0})
    torch.testing.assert_close(output, 2 * lora.model[0](x))
    torch.testing.assert_close(output, merged_output(lora, x, **{name: 2.0}))


@pytest.mark.parametrize("given", [{}, {"factor": 3.0}], ids=["alone", "a number first"])
def test_a_branch_of_keywords_alone(given):
    registry = registry_of(ByKeywordPlugin())
    lora = LoraModel(nn.Sequential(ByKeyword()).double(), LoraConfig(r=2, init="none"), registry=registry)
    x = torch.randn(3, 5).double()
    output = lora.model.eval()[0](**given, x=x)
    torch.testing.assert_close(output, merged_output(lora, **given, x=x))
    with torch.no_grad(), lora.disable_adapter():
        base = lora.model[0](**given, x=x)
    with torch.no_grad(), lora.mixed_batch(["default", None, "default"]):
        mixed = lora.model[0](**given, x=x)
    torch.testing.assert_close(mixed, torch.stack([output[0], base[1], output[2]]))
