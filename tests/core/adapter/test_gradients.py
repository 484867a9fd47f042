"""Tensors that are frozen between a forward and its backward."""

import re
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
import torch.multiprocessing  # registers how tensors are pickled
from torch import nn

from lora_plugins import LoraConfig, LoraModel, StateError

X = torch.ones(2, 4, dtype=torch.float64)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).double()


def test_no_gradient_of_a_frozen_base_is_lost():
    model = net()
    loss = model(X).sum()
    LoraModel(model, LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(StateError, match=r"no gradient to '[01]\.(weight|bias)', which was trained"):
        loss.backward()


@pytest.mark.parametrize(
    ("make", "settings", "names"),
    [
        pytest.param(net, {"target_modules": ["0"], "variant": "dora"}, r"0\.lora_(A|B|magnitude)\.a", id="dora"),
        pytest.param(
            lambda: nn.Sequential(nn.Linear(4, 12)).double(),
            {"fused_parts": {"0": ["q"]}},
            r"0\.lora_[AB]_q\.a",
            id="part",
        ),
        pytest.param(lambda: nn.Linear(4, 2).double(), {}, r"lora_[AB]\.a", id="the model itself"),
    ],
)
def test_no_gradient_of_a_frozen_adapter_is_lost(make, settings, names):
    model = make()
    lora = LoraModel(model, LoraConfig(r=2, **settings), "a")
    loss = model(X).sum()
    lora.set_adapter("a", trainable=False)
    assert any(re.fullmatch(names, name) for name, _ in model.named_parameters())
    with pytest.raises(StateError, match=f"no gradient to '{names}', which was trained"):
        loss.backward()


def test_what_the_user_has_unfrozen_gets_its_gradient():
    model, plain = net(), net()
    loss = model(X).sum()
    LoraModel(model, LoraConfig(r=2, target_modules=["0"]))
    for parameter in model.parameters():
        parameter.requires_grad_()
    loss.backward()
    plain(X).sum().backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(model.get_submodule(name[0])._parameters[name[2:]].grad, parameter.grad)


@pytest.mark.usefixtures("swapped_by_conversions")
def test_a_frozen_base_is_cast_and_loaded_by_swapping():
    model, plain = net(), net()
    lora = LoraModel(model, LoraConfig(r=2, target_modules=["0"], init="none"))
    lora.merge_adapter()
    lora.unmerge_adapter()
    model.float().double().load_state_dict(plain.state_dict())
    with lora.disable_adapter():
        torch.testing.assert_close(model(X), plain(X), rtol=0, atol=0)
    model(X).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        "0.lora_A.default",
        "0.lora_B.default",
    }


@pytest.mark.usefixtures("swapped_by_conversions")
@pytest.mark.parametrize("hooked", [False, True], ids=["plain", "with a hook of the user"])
def test_no_gradient_is_lost_where_conversions_swap_tensors(hooked):
    model = net()
    lora = LoraModel(model, LoraConfig(r=2, target_modules=["0"]), "a")
    lora.set_adapter("a", trainable=False)
    lora.set_adapter("a")
    if hooked:
        for name, factor in model.named_parameters():
            if "lora" in name:
                factor.register_hook(lambda gradient: None)
    loss = model.float().double()(X).sum()
    lora.set_adapter("a", trainable=False)
    with pytest.raises(StateError, match=r"no gradient to '0\.lora_[AB]\.a', which was trained"):
        loss.backward()


def test_hooks_of_the_user_stay_and_no_others():
    model, called = net(), []
    lora = LoraModel(model, LoraConfig(r=2, target_modules=["0"]), "a")
    factor = model[0].lora_B.a
    factor.register_hook(called.append)
    for _ in range(2):
        lora.set_adapter("a", trainable=False)
        lora.set_adapter("a")
    model(X).sum().backward()
    assert len(called) == len(factor._backward_hooks) == 1


def test_a_frozen_base_goes_to_another_process_without_a_warning():
    model = net()
    LoraModel(model, LoraConfig(r=2, target_modules=["0"]))
    assert ForkingPickler.dumps(model)
