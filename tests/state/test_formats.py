"""In every state, an adapter that is written for other libraries comes back as it was, and PEFT merges the same."""

import warnings
from random import Random

import pytest
import torch

from lora_plugins import AdapterFileError, LoraModel
from tests.state.checks import compare_outputs
from tests.state.draw import draw_blocks, draw_step
from tests.state.machine import Machine, opened
from tests.state.plugins import registry
from tests.state.reference import Result, fresh

FORMATS = {"peft": {}, "diffusers": {"component": "unet"}, "kohya": {"component": "unet"}}

SUBCLASSES_WITH_FEWER_ARGUMENTS = ("centered",)
"""Blocks of which PEFT cannot make the layers that it puts beside a layer."""

STEPS = 20


def acting_alone(machine: Machine, name: str) -> Result:
    """What the model computes with one adapter, on the float base."""
    reference = machine.reference.copy()
    reference.base = reference.sources()
    reference.active, reference.weights, reference.stored, reference.training = (name,), {}, {}, False
    return reference.run(*machine.inputs, training=False)


def write_and_read(machine: Machine, name: str, format: str) -> bool:
    """Compares an adapter with what comes back; returns whether the format took it."""
    path = machine.folder / "portable.safetensors" if format != "peft" else machine.folder / "portable"
    reference = machine.reference
    try:
        machine.handle.save_adapter(path, name, format=format, format_options=FORMATS[format])
    except AdapterFileError:
        return False
    base = fresh(machine.blocks, reference.sources(), reference.plain, {})
    LoraModel.load_adapter(base, path, registry=registry())
    expected = acting_alone(machine, name)
    compare_outputs(f"{format} read again", base(*machine.inputs), expected, machine.dtype)
    if format == "peft" and not set(SUBCLASSES_WITH_FEWER_ARGUMENTS) & set(machine.blocks):
        peft = pytest.importorskip("peft")
        base = fresh(machine.blocks, reference.sources(), reference.plain, {})
        theirs = peft.PeftModel.from_pretrained(base, str(path)).eval()
        unmerged = theirs(*machine.inputs)
        merged = theirs.merge_and_unload().eval()(*machine.inputs)
        for block, output in expected.outputs.items():
            off = min(float((each[block] - output).abs().max()) for each in (unmerged, merged))
            assert off <= 1e-5 * (1 + float(output.abs().max())), f"{block} is off by {off} in PEFT"
    return True


def walk(seed: str) -> int:
    """Returns how many adapters were written."""
    random, written = Random(seed), 0
    with opened(draw_blocks(random), torch.float64, random.randrange(1000)) as machine:
        for _ in range(STEPS):
            step = draw_step(random, machine)
            if step.kind == "cast":
                continue
            machine.do(step)
            reference = machine.reference
            if reference.adapters and not (reference.contexts or reference.merged) and random.random() < 0.3:
                name, format = random.choice(list(reference.adapters)), random.choice(list(FORMATS))
                written += write_and_read(machine, name, format)
    return written


@pytest.fixture(autouse=True)
def told():
    """What is said of layers and stored weights has tests of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_some_walks():
    assert sum(walk(f"some.{run}") for run in range(5)) > 1


@pytest.mark.slow
@pytest.mark.parametrize("run", range(300))
def test_many_walks(run):
    walk(f"many.{run}")
