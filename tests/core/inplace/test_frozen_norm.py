"""Layers with running statistics stay in eval mode, whatever else is done to them; what is inside of them does not."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lora_plugins import LoraConfig, LoraModel

CONFIG = {"r": 2, "target_modules": ["0"], "init": "none"}


class Centered(nn.Linear):
    """A layer that is adapted and has running statistics, as a norm has."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.register_buffer("running_mean", torch.zeros(4))

    def forward(self, x):
        if self.training:
            self.running_mean.lerp_(x.detach().mean(0), 0.5)
        return super().forward(x - self.running_mean)


class NormAndDropout(nn.BatchNorm1d):
    """A norm with a layer inside, as those of timm are."""

    def __init__(self) -> None:
        super().__init__(3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(super().forward(x))


class NormWithoutItsFunction(nn.BatchNorm1d):
    """A norm with something that its class leaves out of copies and pickles, and makes again."""

    def __init__(self) -> None:
        super().__init__(3)
        self.scaled = lambda x: 2 * x

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "scaled"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.scaled = lambda x: 2 * x

    def forward(self, x):
        return self.scaled(super().forward(x))


def adapted():
    model = nn.Sequential(Centered(), NormAndDropout())
    return LoraModel(model, LoraConfig(**CONFIG), "a")


def moves(model) -> bool:
    before = [buffer.clone() for buffer in model.buffers()]
    model.train()
    model(torch.randn(8, 4))
    model.eval()
    return not all(torch.equal(*pair) for pair in zip(before, model.buffers(), strict=True))


def merged_and_back(lora):
    lora.merge_adapter()
    lora.unmerge_adapter()


CALLS = {
    "add": lambda lora: lora.add_adapter("b", LoraConfig(**CONFIG)),
    "add-tracking": lambda lora: lora.add_adapter("b", LoraConfig(**CONFIG, norm="track")),
    "set": lambda lora: lora.set_adapter("a", trainable=False),
    "merge": merged_and_back,
    "combine": lambda lora: lora.add_weighted_adapter(["a"], [0.5], "b"),
    "plan": lambda lora: lora.plan(lora.model, LoraConfig(**CONFIG)),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "copied",
    [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["itself", "deepcopy", "pickle"],
)
def test_an_adapted_layer_with_statistics_stays_still(call, copied):
    lora = adapted()
    assert not moves(lora.model)
    CALLS[call](lora)
    model = copied(lora.model)
    assert not moves(model)
    LoraModel(model).unload()
    assert moves(model)
    assert [type(layer) for layer in model] == [Centered, NormAndDropout]


def test_what_a_norm_leaves_out_of_pickles_is_left_out():
    model = nn.Sequential(nn.Linear(4, 3), NormWithoutItsFunction())
    LoraModel(model, LoraConfig(**CONFIG))
    other, x = pickle.loads(pickle.dumps(model)), torch.randn(8, 4)
    assert not moves(other)
    torch.testing.assert_close(other(x), model.eval()(x), rtol=0, atol=0)


def test_a_second_plan_knows_the_class():
    model = nn.Sequential(Centered(), NormAndDropout())
    config = LoraConfig(**CONFIG, modules_to_save=["1"])
    planned = LoraModel.plan(model, config)
    LoraModel(model, LoraConfig(**CONFIG), "a")
    assert LoraModel.plan(model, config) == planned


@pytest.mark.parametrize("first", [True, False], ids=["train", "eval"])
def test_what_is_inside_follows_the_model(first):
    model = nn.Sequential(Centered(), NormAndDropout()).train(first)
    lora = LoraModel(model, LoraConfig(**CONFIG), "a")
    for mode in (first, True, False):
        model.train(mode)
        assert (model[1].drop.training, model[1].training) == (mode, False)
    model.train()
    model[1].drop.eval()
    lora.unload()
    assert (model[1].drop.training, model[1].training) == (False, True)
