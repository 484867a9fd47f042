"""Layers that look newly initialized, behind adapted ones, that nobody trains."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lora_plugins import LoraConfig, LoraModel
from lora_plugins.plan import forgotten_layers


def trained(layer: nn.Module) -> nn.Module:
    """Gives a layer the tails of values that training leaves, and a bias."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2)
    return layer


def forgotten(*heads: nn.Module, bodies=3, new_bodies=0, **fields) -> list[str]:
    torch.manual_seed(0)
    body = [trained(nn.Linear(16, 16)) for _ in range(bodies)] + [nn.Linear(16, 16) for _ in range(new_bodies)]
    model = nn.ModuleDict({"body": nn.Sequential(*body), "head": nn.Sequential(*heads)})
    config = LoraConfig(r=1, target_modules=r"body\.\d+", **fields)
    return forgotten_layers(model, LoraModel.plan(model, config))


def narrow(layer: nn.Module) -> nn.Module:
    """Stores a layer in 8 bits, as checkpoints for serving have it."""
    for name, value in [*layer.named_parameters()]:
        setattr(layer, name, nn.Parameter(value.detach().to(torch.float8_e4m3fn), requires_grad=False))
    return layer


def without_bias_values(layer: nn.Module) -> nn.Module:
    layer.bias = nn.Parameter(layer.bias.to("meta"))
    return layer


def zero_bias(layer: nn.Module) -> nn.Module:
    nn.init.zeros_(layer.bias)
    return layer


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(lambda: nn.Linear(16, 8), id="linear"),
        pytest.param(lambda: nn.Linear(64, 1, bias=False), id="one output"),
        pytest.param(lambda: nn.Conv2d(16, 8, 3), id="convolution"),
        pytest.param(lambda: zero_bias(trained(nn.Linear(16, 8))), id="bias of zeros"),
        pytest.param(lambda: zero_bias(nn.Linear(4, 2)), id="bias of zeros, few values"),
    ],
)
def test_a_new_head_is_named(head):
    assert forgotten(head()) == ["head.0"]
    assert forgotten(head(), modules_to_save=["head"]) == []


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(lambda: trained(nn.Linear(16, 8)), id="trained"),
        pytest.param(
            lambda: nn.Linear(16, 8).requires_grad_(False).apply(lambda m: m.weight.data.mul_(0.5)), id="narrow"
        ),
        pytest.param(lambda: nn.Linear(16, 8).apply(lambda m: m.weight.data.mul_(1.5)), id="wide"),
        pytest.param(lambda: nn.Linear(16, 8).apply(lambda m: m.weight.data.sign_().mul_(0.25)), id="two values"),
        pytest.param(lambda: nn.Linear(9, 7), id="63 values"),
        pytest.param(lambda: nn.Linear(16, 8, device="meta"), id="no values"),
        pytest.param(lambda: nn.Embedding(16, 8), id="another type"),
        pytest.param(lambda: narrow(nn.Linear(16, 8)), id="8 bits"),
        pytest.param(lambda: without_bias_values(trained(nn.Linear(16, 8))), id="no values of the bias"),
    ],
)
def test_another_head_is_not(head):
    torch.manual_seed(0)
    assert forgotten(head()) == []


@pytest.mark.parametrize("fields", [{}, {"modules_to_save": ["body.2"]}], ids=["adapted", "saved"])
def test_one_that_is_tied_to_another_is_not(fields):
    """As box heads of detectors are in transformers, whose decoder has them under a second name."""
    torch.manual_seed(0)
    body, head = [*(trained(nn.Linear(16, 16)) for _ in range(3)), nn.Linear(16, 16)], nn.Linear(16, 16)
    tied = body[2] if fields else body[3]
    nn.init.zeros_(tied.bias)
    head.weight, head.bias = tied.weight, tied.bias
    model = nn.ModuleDict({"body": nn.Sequential(*body), "head": head})
    config = LoraConfig(r=1, target_modules=r"body\.[013]", **fields)
    assert forgotten_layers(model, LoraModel.plan(model, config)) == []


def test_of_several_layers_those_that_are_new_are_named():
    assert forgotten(nn.Linear(16, 16), trained(nn.Linear(16, 16)), nn.Linear(16, 4)) == ["head.0", "head.2"]


@pytest.mark.parametrize(("new", "named"), [(2, ["head.0"]), (3, []), (4, [])])
def test_where_most_of_the_adapted_layers_are_new_nothing_is_said(new, named):
    assert forgotten(nn.Linear(16, 8), new_bodies=new) == named


def test_what_lies_before_the_last_adapted_layer_is_not_looked_at():
    model = nn.Sequential(trained(nn.Linear(16, 16)), nn.Linear(16, 16), trained(nn.Linear(16, 16)), nn.Linear(16, 8))
    assert forgotten_layers(model, LoraModel.plan(model, LoraConfig(r=1, target_modules=["0", "2"]))) == ["3"]


def test_adapted_layers_of_8_bits_tell_nothing():
    model = nn.Sequential(narrow(trained(nn.Linear(16, 16))), nn.Linear(16, 8))
    assert forgotten_layers(model, LoraModel.plan(model, LoraConfig(r=1, target_modules=["0"]))) == []


def test_adapted_layers_of_other_types_are_passed_over():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 16), trained(nn.Linear(16, 16)), nn.Linear(16, 8))
    assert forgotten_layers(model, LoraModel.plan(model, LoraConfig(r=1, target_modules=["0", "1"]))) == ["2"]


@pytest.mark.parametrize("made", [lambda layer: layer, weight_norm], ids=["plain", "weight norm"])
@pytest.mark.parametrize("teacher", [["body"], ["body", "head"]], ids=["body", "body and head"])
def test_what_the_author_froze_beside_what_is_trained_is_to_stay(teacher, made):
    torch.manual_seed(0)
    body, copy = (
        nn.Sequential(trained(nn.Linear(16, 16)), made(trained(nn.Linear(16, 16, bias=False)))) for _ in range(2)
    )
    model = nn.ModuleDict({"body": body, "head": nn.Linear(16, 8)})
    model["teacher"] = nn.ModuleDict({"body": copy, "head": nn.Linear(16, 8)})
    frozen = [f"teacher.{part}.{name}" for part in teacher for name, _ in model["teacher"][part].named_parameters()]
    plan = LoraModel.plan(model, LoraConfig(r=1, target_modules=r"(teacher\.)?body\.\d"))
    assert forgotten_layers(model, plan) == ["teacher.head"]
    assert forgotten_layers(model, plan, frozen) == (["head"] if "head" in teacher else ["head", "teacher.head"])


def test_where_the_author_froze_all_that_is_adapted_a_frozen_head_is_named():
    torch.manual_seed(0)
    model = nn.Sequential(trained(nn.Linear(16, 16)), nn.Linear(16, 8))
    frozen = [name for name, _ in model.named_parameters()]
    assert forgotten_layers(model, LoraModel.plan(model, LoraConfig(r=1, target_modules=["0"])), frozen) == ["1"]
