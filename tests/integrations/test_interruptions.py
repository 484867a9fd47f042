"""What the integrations change for a while in objects of the user's and in the process, wherever it is stopped."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("lightning")

from lora_plugins import LoraConfig, LoraModel
from lora_plugins.integrations.diffusers import in_eval_mode
from lora_plugins.integrations.lightning.checkpoint.objects import _nothing_else_allowed
from lora_plugins.integrations.lightning.shims import MethodShims
from lora_plugins.integrations.lightning.training.calibration_data import _without_loggers
from lora_plugins.integrations.lightning.training.hidden_factors import _without_factors
from tests.state.interrupted import every_line, passed, stopped


def mixed():
    """A module in training mode with a part that is not."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Linear(2, 2))
    model[1].eval()
    return model


def adapted():
    model = mixed()
    LoraModel(model, LoraConfig(r=1, target_modules=["0", "2"]))
    return model


def pipeline():
    return SimpleNamespace(components={"unet": mixed(), "vae": mixed(), "scheduler": None})


def within(block):
    with block:
        pass


def modes(pipe):
    parts = [part for part in pipe.components.values() if part is not None]
    return [module.training for part in parts for module in part.modules()]


def parameters(model):
    return [(name, id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()]


BLOCKS = {
    "pipeline-in-eval-mode": (pipeline, lambda pipe: within(in_eval_mode(pipe)), modes),
    "hidden-factors": (adapted, lambda model: within(_without_factors(model)), parameters),
    "no-loggers": (
        lambda: SimpleNamespace(loggers=["first", "second"]),
        lambda trainer: within(_without_loggers(trainer)),
        lambda trainer: trainer.loggers,
    ),
    "nothing-else-allowed": (
        lambda: None,
        lambda _: within(_nothing_else_allowed()),
        lambda _: {*torch.serialization.get_safe_globals()},
    ),
}
"""What there is before, the call, and what is to be as it was; by name."""


@pytest.mark.parametrize(("prepare", "call", "look"), BLOCKS.values(), ids=BLOCKS)
def test_what_is_changed_for_a_while_is_put_back(prepare, call, look):
    with torch.serialization.safe_globals([SimpleNamespace]):
        call(prepare())  # the first call passes other lines, too
        counted = prepare()
        for at in every_line(passed(lambda: call(counted))):
            found = prepare()
            before = copy.copy(look(found))
            where, raised = stopped(lambda found=found: call(found), at)
            assert raised, where
            assert look(found) == before, where


def test_methods_are_restored_by_the_call_after_one_that_was_stopped():
    def shimmed():
        owner = nn.Module()
        shims = MethodShims(owner)
        shims.after("train", lambda _: None)
        shims.after("eval", lambda _: None)
        return owner, shims

    for at in range(len(passed(shimmed()[1].remove))):
        owner, shims = shimmed()
        where, _ = stopped(shims.remove, at)
        shims.remove()
        assert not {"train", "eval"} & vars(owner).keys(), where
