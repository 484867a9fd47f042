"""What the tasks change for a while in a model and in the process, put back wherever it is stopped."""

import pytest
from huggingface_hub import constants
from torch import nn
from transformers.utils import logging

from lora_plugins.tasks.diffusion.text_to_image import _upcast
from lora_plugins.tasks.hub import cache_where_unreachable
from lora_plugins.tasks.models.from_transformers import _quiet_library
from lora_plugins.tasks.training import eval_mode, evaluated_on
from tests.state.interrupted import passed, stopped


class Part(nn.Linear):
    """In 16 bits, and to be run in 32, as some autoencoders are; its inside is not in training mode."""

    device = "cpu"
    config = {"force_upcast": True}  # noqa: RUF012

    def __init__(self):
        super().__init__(2, 2)
        self.inside = nn.Linear(2, 2).eval()
        self.half()

    @property
    def dtype(self):
        return self.weight.dtype


def look(part):
    return (
        [module.training for module in part.modules()],
        [parameter.dtype for parameter in part.parameters()],
        constants.HF_HUB_OFFLINE,
        (logging.get_verbosity(), logging.is_progress_bar_enabled()),
    )


BLOCKS = {
    "eval-mode": eval_mode,
    "evaluated": lambda part: evaluated_on(part, "cpu"),
    "upcast": _upcast,
    "hub": lambda _: cache_where_unreachable(),
    "library": lambda _: _quiet_library(),
}


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_what_is_changed_for_a_while_is_put_back(block, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there

    def run(part):
        with block(part):
            pass

    for at in range(len(passed(lambda: run(Part())))):
        part = Part()
        before = look(part)
        where, raised = stopped(lambda part=part: run(part), at)
        assert raised, where
        assert look(part) == before, where
