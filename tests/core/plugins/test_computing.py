"""Subclasses of a layer that compute as it does have its branch; others are run by their own forward."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lora_plugins import LoraConfig, LoraModel, TargetError
from tests.core.libraries import of_library


class Built(nn.Linear):
    """A constructor, a method, a constant and texts of its own."""

    kind = "built"

    def __init__(self, width: int = 6) -> None:
        super().__init__(width, width)

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @staticmethod
    def doubled(x: Tensor) -> Tensor:
        return 2 * x

    def extra_repr(self) -> str:
        return f"{self.kind}, {super().extra_repr()}"

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)


class BuiltAgain(Built):
    """A subclass of that."""

    def __init__(self) -> None:
        super().__init__(6)


class Depthwise(nn.Conv2d):
    """A convolution with fewer arguments."""

    def __init__(self) -> None:
        super().__init__(6, 6, 3, groups=6)


class Forward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


class BelowForward(Forward):
    """Adds nothing to one that does."""


class Convolution(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(2 * x, weight, bias)


class Call(nn.Linear):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(2 * x)


class Doubling:
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


class Mixed(Doubling, nn.Linear):
    """Two bases."""


class Attributes(nn.Module):
    def __getattr__(self, name: str) -> object:
        return super().__getattr__(name)


class Behind(nn.Linear, Attributes):
    """Two bases, of which the second has what the first one calls."""


class Reading(nn.Linear):
    def __getattr__(self, name: str) -> object:
        return super().__getattr__(name)


SAME = {
    "linear": (Built, (4, 6)),
    "linear-twice": (BuiltAgain, (4, 6)),
    "conv2d": (Depthwise, (4, 6, 5, 5)),
    "linear-timm": (lambda: of_library("timm.layers.linear", "Linear")(6, 6), (4, 6)),
    "conv3d-torchvision": (
        lambda: of_library("torchvision.models.video.resnet", "Conv3DSimple")(6, 6),
        (4, 6, 3, 3, 3),
    ),
}
OTHER = {
    "forward": lambda: Forward(6, 6),
    "below_forward": lambda: BelowForward(6, 6),
    "convolution": lambda: Convolution(6, 6, 3),
    "call": lambda: Call(6, 6),
    "two_bases": lambda: Mixed(6, 6),
    "second_of_two_bases": lambda: Behind(6, 6),
    "attributes": lambda: Reading(6, 6),
}


@pytest.mark.parametrize("memory", ["normal", "low"])
@pytest.mark.parametrize(("make", "shape"), SAME.values(), ids=SAME)
def test_dropout_acts_on_what_computes_as_its_base(make, shape, memory):
    torch.manual_seed(0)
    model = nn.Sequential(make()).double()
    plain, x = copy.deepcopy(model), torch.randn(shape, dtype=torch.float64)
    lora = LoraModel(model, LoraConfig(r=2, alpha=3, init="none", dropout=0.5, memory=memory))
    A, B = (model[0]._modules[name]["default"] for name in ("lora_A", "lora_B"))
    with torch.no_grad():
        plain[0].weight += 1.5 * (B @ A).view_as(plain[0].weight)
    assert not torch.equal(model(x), model(x))
    model.eval()
    torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lora.merge_and_unload()(x), plain(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", OTHER.values(), ids=OTHER)
def test_dropout_is_refused_where_more_is_computed(make):
    with pytest.raises(TargetError, match=r"'0': .* cannot honor dropout"):
        LoraModel(nn.Sequential(make()), LoraConfig(dropout=0.5))


@pytest.mark.parametrize("make", OTHER.values(), ids=OTHER)
def test_what_computes_more_is_run_by_its_own_forward(make):
    torch.manual_seed(0)
    layer = make().double()
    model = nn.Sequential(layer)
    plain = copy.deepcopy(model)
    x = torch.randn((4, 6, 5, 5) if isinstance(layer, nn.Conv2d) else (4, 6), dtype=torch.float64)
    LoraModel(model, LoraConfig(r=2, alpha=3, init="none"))
    A, B = (model[0]._modules[name]["default"] for name in ("lora_A", "lora_B"))
    with torch.no_grad():
        plain[0].weight += 1.5 * (B @ A).view_as(plain[0].weight)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)
