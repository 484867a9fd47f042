"""Averages of models with stored weights: their integers stay what they are, or the average says that they are not."""

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


def integers(model):
    return {key: value.clone() for key, value in model.state_dict().items() if not value.is_floating_point()}


def differing(model, expected):
    found = model.state_dict()
    return {key for key, value in expected.items() if not torch.equal(found[key], value)}


def step(model):
    """Moves what is trained."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)


def of_floating_tensors(averaged, current, count):
    """As docs/howto/quantize.md has it."""
    for mine, other in zip(averaged, current, strict=True):
        plain = type(mine) is torch.Tensor and mine.is_floating_point()
        mine.lerp_(other, 0.1) if plain else mine.copy_(other)


class ByHand:
    """An average by hand in a copy."""

    def __init__(self, model):
        self.module = copy.deepcopy(model)

    @torch.no_grad()
    def update_parameters(self, model):
        self.write(*(dict(each.state_dict()) for each in (self.module, model)))

    def write(self, mine, other):
        for name, value in mine.items():
            value.copy_(0.9 * value + 0.1 * other[name])


class Loaded(ByHand):
    def write(self, mine, other):
        self.module.load_state_dict({name: 0.9 * value + 0.1 * other[name] for name, value in mine.items()})


class Assigned(ByHand):
    def write(self, mine, other):
        own = dict(self.module.named_parameters())
        for name, value in mine.items():
            own[name].data = 0.9 * value + 0.1 * other[name]


KEEPING = {
    "equal": AveragedModel,
    "a decay that keeps": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999)),
    "floating tensors": lambda model: AveragedModel(model, multi_avg_fn=of_floating_tensors),
    "state dicts": Loaded,
}
CUTTING = {
    "exponential": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "with buffers": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9999), use_buffers=True),
    "one by one": lambda model: AveragedModel(model, avg_fn=get_ema_avg_fn(0.9)),
    "in place": ByHand,
    "assigned": Assigned,
}
STORAGES = pytest.mark.parametrize("storage", ["nf4", "int8"])
INDEX = torch.tensor([[1, 5, 8]])


def averaged(make, model):
    average = make(model)
    for _ in range(3):
        step(model)
        average.update_parameters(model)
    return average.module


@STORAGES
@pytest.mark.parametrize("make", KEEPING.values(), ids=KEEPING)
def test_an_average_that_keeps_integers_is_used(make, storage):
    model = build(storage)
    before = integers(model)
    average = averaged(make, model)
    average.eval()
    assert not differing(average, before)
    assert not torch.equal(average[1].lora_A.default, model[1].lora_A.default)
    copy.deepcopy(average).train()


@STORAGES
@pytest.mark.parametrize("make", CUTTING.values(), ids=CUTTING)
def test_an_average_that_cuts_integers_off_is_an_error(make, storage):
    model = build(storage)
    before = integers(model)
    average = averaged(make, model)
    assert differing(average, before)
    for use in (average.eval, average.train, lambda: copy.deepcopy(average)):
        with pytest.raises(StateError, match=rf"stored as {storage}, were changed in a copy.*load_state_dict"):
            use()
    average.load_state_dict(
        {key: value for key, value in model.state_dict().items() if "_stored." in key}, strict=False
    )
    average.eval()
    assert not differing(average, before)
    model.eval()


def test_an_average_of_other_integers_does_not_load():
    model, other = build(), build(seed=1)
    before = integers(model)
    mixed = {key: 0.5 * value + 0.5 * other.state_dict()[key] for key, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"'1\.weight_stored\.codes' holds integers of a weight stored as nf4"):
        model.load_state_dict(mixed)
    assert not differing(model, before)


@pytest.mark.parametrize("assign", [False, True])
def test_a_copy_takes_the_integers_of_another_base(assign):
    model, other = build(), build(seed=1)
    copied = copy.deepcopy(model)
    copied.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    for each in (copied, copy.deepcopy(copied), pickle.loads(pickle.dumps(copied)), copied.double().float()):
        assert not differing(each.train().eval(), integers(other))
        assert torch.equal(each(INDEX), other(INDEX))


def test_nothing_is_read_of_a_copy_that_nobody_wrote_to():
    """On a device without values, where a read is an error."""
    copied = copy.deepcopy(build().to("meta"))
    copy.deepcopy(copied.train()).eval()
    assert copied(INDEX.to("meta")).shape == (1, 3, 16)
