"""Copies of a model with stored weights: what averages all parameters leaves them those of the original."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from lora_plugins import LoraConfig, LoraModel, StateError


def build(storage="nf4", seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(9, 16), nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    LoraModel(model, LoraConfig(r=2, init="none", quantize=storage, quantize_options={"min_size": 0}))
    return model


def stored(model):
    return {key: value.clone() for key, value in model.state_dict().items() if "_stored." in key}


def differing(model, expected):
    found = stored(model)
    return [key for key, value in expected.items() if not torch.equal(found[key], value)]


def step(model):
    """Moves the factors."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)


class Assigned:
    """An average by hand, which assigns data of another type."""

    def __init__(self, model):
        self.module = copy.deepcopy(model)

    def update_parameters(self, model):
        for mine, other in zip(self.module.parameters(), model.parameters(), strict=True):
            mine.data = 0.9 * mine.data + 0.1 * other.data


AVERAGES = {
    "equal": AveragedModel,
    "exponential": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "with buffers": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
    "one by one": lambda model: AveragedModel(model, avg_fn=get_ema_avg_fn(0.9)),
    "assigned": Assigned,
}
INDEX = torch.tensor([[1, 5, 8]])


@pytest.mark.parametrize("storage", ["nf4", "int8"])
@pytest.mark.parametrize("make", AVERAGES.values(), ids=AVERAGES)
def test_an_average_has_the_stored_tensors_of_the_model(make, storage):
    model = build(storage)
    before, average = stored(model), make(model)
    for _ in range(3):
        step(model)
        average.update_parameters(model)
    expected = copy.deepcopy(model)
    expected.load_state_dict({k: v for k, v in average.module.named_parameters() if "_stored." not in k}, strict=False)
    assert torch.equal(average.module(INDEX), expected(INDEX))
    average.update_parameters(model)
    assert not differing(average.module, before)
    assert not differing(model, before)
    assert not torch.equal(average.module[1].lora_A.default, model[1].lora_A.default)


CHANGED = {"forward": lambda model: model(INDEX), "state dict": lambda model: model.state_dict()}
CHANGED |= {"copy": copy.deepcopy, "pickle": pickle.dumps, "cast": lambda model: model.double()}


def without_its_model(storage="nf4"):
    """An average whose model is gone, with what the model had stored."""
    model = build(storage)
    average, before = AVERAGES["exponential"](model), stored(model)
    for _ in range(3):
        average.update_parameters(model)
    return average.module, before


@pytest.mark.parametrize("use", CHANGED.values(), ids=CHANGED)
def test_where_the_model_is_gone_it_is_an_error(use):
    average, before = without_its_model()
    with pytest.raises(StateError, match=r"changed in a copy of a model.* is gone .*Load them from where"):
        use(average)
    average.load_state_dict(before, strict=False)
    use(average)
    assert not differing(average, before)


def test_where_the_model_has_others_it_is_an_error():
    model = build()
    average = AVERAGES["exponential"](model)
    for _ in range(3):
        average.update_parameters(model)
    model.load_state_dict(build(seed=1).state_dict())
    with pytest.raises(StateError, match="is gone or has others"):
        average(INDEX)


def test_a_copy_of_its_own_takes_other_tensors():
    model, other = build(), build(seed=1)
    copied = copy.deepcopy(model)
    del model
    copied.load_state_dict(other.state_dict())
    for each in (copied, copy.deepcopy(copied), pickle.loads(pickle.dumps(copied)), copied.to("cpu")):
        assert torch.equal(each(INDEX), other(INDEX))


def test_an_ensemble_in_one_call():
    """Functional calls give a copy tensors without memory of their own."""
    models = [build(seed=seed) for seed in range(3)]
    stacked = {
        name: torch.stack([dict(model.named_parameters())[name].detach() for model in models])
        for name, _ in models[0].named_parameters()
    }
    base = copy.deepcopy(models[0]).to("meta")
    got = torch.vmap(lambda values: torch.func.functional_call(base, values, (INDEX,)))(stacked)
    torch.testing.assert_close(got, torch.stack([model(INDEX) for model in models]))
