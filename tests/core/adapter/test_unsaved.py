"""`save_adapter` tells that an adapter was not trained at all: its optimizer does not have it, or it was frozen."""

import pytest
import torch
from torch import nn

from lora_plugins import LoraConfig, LoraModel

LAYERS = {"linear": (lambda: nn.Linear(4, 3), torch.randn(2, 4)), "embedding": (lambda: nn.Embedding(4, 3), [[0, 1]])}


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def step(model, optimizer, x):
    model(torch.as_tensor(x)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(("make", "x"), LAYERS.values(), ids=LAYERS)
def test_an_optimizer_that_was_made_before_the_adapter_is_told(make, x, tmp_path):
    model = nn.Sequential(make())
    optimizer = sgd(model)
    lora = LoraModel(model, LoraConfig(r=2))
    step(model, optimizer, x)
    with pytest.warns(UserWarning, match="'default' still changes nothing.* made before the adapter") as told:
        lora.save_adapter(tmp_path)
    assert told[0].filename == __file__


@pytest.mark.parametrize(("make", "x"), LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("steps", [0, 1])
def test_one_that_was_made_afterwards_is_not(make, x, steps, tmp_path):
    model = nn.Sequential(make())
    lora = LoraModel(model, LoraConfig(r=2))
    optimizer = sgd(model)
    for _ in range(steps):
        step(model, optimizer, x)
    lora.save_adapter(tmp_path)


def test_an_adapter_that_waits_is_not(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3))
    lora = LoraModel(model, LoraConfig(r=2))
    lora.add_adapter("waits", LoraConfig(r=2))
    step(model, sgd(model), torch.ones(2, 4))
    for name in ("default", "waits"):
        lora.save_adapter(tmp_path / name, name)


def test_what_was_trained_beside_the_adapter_is_told_once(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    lora = LoraModel(model, LoraConfig(r=2, target_modules=["0"], init="none"))
    model[1].requires_grad_(True)
    step(model, sgd(model), torch.ones(2, 4))
    with pytest.warns(UserWarning, match="require a gradient and are no part of an adapter") as told:
        lora.save_adapter(tmp_path)
    assert len(told) == 1


def with_head(variant="lora"):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    config = LoraConfig(r=2, target_modules=["0", "1"], modules_to_save=["2"], variant=variant)
    return model, LoraModel(model, config)


def freeze(*parts):
    for part in parts:
        part.requires_grad_(False)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_an_adapter_that_was_frozen_beside_its_head_is_told(variant, tmp_path):
    model, lora = with_head(variant)
    freeze(model[0], model[1])
    step(model, sgd(model), torch.ones(2, 4))
    with pytest.warns(UserWarning, match="'default' still changes nothing, and none of its A and B") as told:
        lora.save_adapter(tmp_path)
    assert [each.filename for each in told] == [__file__]


FROZEN = {
    "one layer": lambda model: freeze(model[0]),
    "A": lambda model: freeze(*(model[i].lora_A for i in (0, 1))),
    "the whole model": freeze,
    "the head": lambda model: freeze(model[2]),
}


@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
def test_one_that_was_frozen_in_part_or_with_its_head_is_not(frozen, tmp_path):
    model, lora = with_head()
    frozen(model)
    lora.save_adapter(tmp_path)


def test_one_that_was_frozen_after_it_was_trained_is_not(tmp_path):
    model, lora = with_head()
    step(model, sgd(model), torch.ones(2, 4))
    freeze(model[0], model[1])
    lora.save_adapter(tmp_path)


def test_one_that_waits_while_another_trains_the_same_head_is_not(tmp_path):
    model, lora = with_head()
    lora.add_adapter("waits", LoraConfig(r=2, target_modules=["0", "1"], modules_to_save=["2"]))
    step(model, sgd(model), torch.ones(2, 4))
    lora.save_adapter(tmp_path, "waits")
