"""Copies of weights in lists, dicts and buffers, which never see an adapter: told before training."""

import copy
import warnings
from weakref import ref

import pytest
import torch
from torch import nn

from tests.integrations.lightning.toys import Classifier, loader, lora, trainer


class Shadow:
    """An average of its own, as packages for that have."""

    def __init__(self, parameters):
        self.shadow = [parameter.detach().clone() for parameter in parameters]


def as_dict(module):
    module.shadow = {name: p.detach().clone() for name, p in module.named_parameters()}


def as_helper(module):
    module.ema = Shadow(module.parameters())


class Holder:
    """Holds the average as a module, as ExponentialMovingAverage of mmlearn does."""

    def __init__(self, model):
        self.model = model


def as_hidden_module(module):
    module._teacher = [copy.deepcopy(module.net)]  # which keeps it out of the state dict


def as_model_of_a_helper(module):
    module.average = Holder(copy.deepcopy(module.net))


def as_buffers(module):
    module.ema = nn.Module()
    for name, parameter in module.net.named_parameters():
        module.ema.register_buffer(name.replace(".", ""), parameter.detach().clone())


def fit(tmp_path, module):
    trainer(tmp_path, [lora()]).fit(module, loader())


@pytest.mark.parametrize(
    ("keep", "name"),
    [
        (as_dict, "shadow"),
        (as_helper, r"ema\.shadow"),
        (as_buffers, "ema"),
        (as_hidden_module, "_teacher"),
        (as_model_of_a_helper, r"average\.model"),
    ],
    ids=["dict", "list", "buffers", "hidden_module", "model_of_a_helper"],
)
def test_copies_that_were_made_before_are_named(tmp_path, keep, name):
    module = Classifier()
    keep(module)
    with pytest.warns(UserWarning, match=rf"'{name}' of Classifier has copies of weights.*After a merge.*on_fit_start"):
        fit(tmp_path, module)


def others(module):
    module.shadow = [torch.zeros_like(parameter) for parameter in module.parameters()]


def a_module_of_its_own(module):
    module._parts = [module.net]


def themselves(module):
    module.all_parameters = list(module.parameters())


class InFitStart(Classifier):
    def on_fit_start(self):
        self.replaced = [ref(tensor) for tensor in getattr(self, "shadow", {}).values()]
        as_dict(self)

    def on_train_start(self):
        assert not any(tensor() is not None for tensor in self.replaced), "nobody keeps what was replaced in memory"


@pytest.mark.parametrize(
    ("cls", "keep"),
    [
        (Classifier, others),
        (Classifier, themselves),
        (Classifier, a_module_of_its_own),
        (InFitStart, lambda _: None),
        (InFitStart, as_dict),  # which on_fit_start replaces, as in a subclass of a module that makes it before
    ],
)
def test_what_is_no_such_copy_says_nothing(tmp_path, cls, keep):
    module = cls()
    keep(module)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(tmp_path, module)
    assert not [each for each in told if "copies of weights" in str(each.message)]
