"""Layers that keep what they compute from their weight, with a plugin as the tutorial describes it."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from lora_plugins import LoraConfig, LoraModel, RowMajorPlugin, build_registry, hookimpl
from tests.core.registries import registry_of


class Halved(nn.Module):
    """Keeps half of its weight in eval mode, until train() is called."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5, dtype=torch.float64))
        self.kept = None

    def half(self):
        return self.weight.detach() / 2

    def train(self, mode=True):
        self.kept = None
        return super().train(mode)

    def forward(self, x):
        if self.training:
            return linear(x, self.weight / 2)
        if self.kept is None:
            self.kept = self.half()
        return linear(x, self.kept)


def ignored(layer, value):
    """A setter."""


class HalvedPlugin(RowMajorPlugin):
    name = "halved"
    module_type = Halved
    class_attributes = {"kept": property(Halved.half, ignored)}  # noqa: RUF012

    def forget(self, layer):
        layer.kept = None


class Plugins:
    @hookimpl
    def lora_plugins_register_layers(self, registrar):
        registrar.add(HalvedPlugin())


X = torch.ones(2, 5, dtype=torch.float64)


def call_disabled(lora):
    with lora.disable_adapter():
        lora.model(X)


def call_without_active_adapters(lora):
    lora.set_adapter([])
    lora.model(X)
    lora.set_adapter("default")


def call_merged(lora):
    lora.merge_adapter()
    lora.model(X)
    lora.unmerge_adapter()


@pytest.mark.parametrize("call", [call_disabled, call_without_active_adapters, call_merged], ids=lambda it: it.__name__)
@pytest.mark.parametrize(
    ("leave", "is_base"),
    [
        (lambda lora: lora.merge_adapter(), False),
        (lambda lora: lora.merge_and_unload(), False),
        (lambda lora: lora.unload(), True),
        (lambda lora: lora.delete_adapter("default"), True),
    ],
    ids=["merged", "merged for good", "unloaded", "deleted"],
)
def test_what_was_kept_without_the_update_is_dropped(call, leave, is_base):
    torch.manual_seed(0)
    model = nn.Sequential(Halved()).eval()
    base = model(X)
    lora = LoraModel(model, LoraConfig(r=2, init="none"), registry=build_registry([("mine", Plugins())]))
    adapted = linear(X, lora.model[0].weight / 2)
    call(lora)
    torch.testing.assert_close(model(X), adapted, rtol=1e-12, atol=1e-12)
    leave(lora)
    torch.testing.assert_close(model(X), base if is_base else adapted, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(base, adapted)


class FailsToForget(HalvedPlugin):
    def forget(self, layer):
        layer.keptt.clear()


def test_an_error_of_forget_is_told_with_its_place():
    lora = LoraModel(nn.Sequential(Halved()), LoraConfig(r=2), registry=registry_of(FailsToForget()))
    with pytest.raises(AttributeError, match="keptt") as caught:
        lora.unload()
    assert caught.value.__notes__ == ["It was raised in forget() of the layer type 'halved', for '0'."]
