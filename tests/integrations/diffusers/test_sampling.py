"""Samples with seeds of their own, and contact sheets."""

import numpy as np
import pytest
import torch
from PIL import Image

from lora_plugins import ConfigError
from lora_plugins.integrations.diffusers import Sampling, contact_sheet, sample
from tests.integrations.diffusers.pipelines import PIPELINES, build

PROMPTS = ["a photo of sks dog", "a cat", "a dog"]


def test_a_picture_depends_on_its_prompt_and_seed_alone():
    pipe = build("Stable Diffusion")
    pipe.unet.train()
    sampling = Sampling(steps=2, guidance=2.0, batch_size=2)
    state = torch.get_rng_state()
    together = sample(pipe, PROMPTS, [3, 4, 5], sampling)
    assert torch.equal(torch.get_rng_state(), state)
    assert pipe.unet.training
    assert not pipe.text_encoder.training
    again = sample(pipe, PROMPTS[2:], np.array([5]), sampling)
    assert again[0].tobytes() == together[2].tobytes()
    assert together[0].tobytes() != sample(pipe, PROMPTS[:1], [4], sampling)[0].tobytes()


def test_bad_input_is_named():
    pipe = build("Stable Diffusion")
    with pytest.raises(ConfigError, match="A prompt is empty"):
        sample(pipe, ["a dog", " "], [0, 1])
    with pytest.raises(ConfigError, match="3 prompts and 1 seed: "):
        sample(pipe, PROMPTS, [0])
    with pytest.raises(ConfigError, match="steps is a whole number of at least 1, not 0"):
        Sampling(steps=0)
    with pytest.raises(ConfigError, match="height is 16 and width is None: give both"):
        Sampling(height=16)
    with pytest.raises(ConfigError, match="negative_prompt is what guidance leads away from, and guidance is 1, which"):
        Sampling(guidance=1, negative_prompt="a cat")
    with pytest.raises(ConfigError, match=f"A seed is {2**64}; torch takes"):
        sample(pipe, PROMPTS[:1], [2**64])


@pytest.mark.parametrize(
    ("sampling", "said"),
    [
        pytest.param(Sampling(height=20, width=16), "divisible by 8 but are 20", id="height"),
        pytest.param(Sampling(steps=2000), "2000 cannot be larger than", id="steps"),
    ],
)
def test_what_the_pipeline_refuses_is_told(sampling, said):
    with pytest.raises(ConfigError, match=f"The StableDiffusionPipeline refuses to draw this: .*{said}"):
        sample(build("Stable Diffusion"), PROMPTS[:1], [0], sampling)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_negative_prompt_is_read_or_refused(name):
    pipe, negative = build(name), Sampling(steps=2, negative_prompt="a cat")
    if name == "Flux":
        with pytest.raises(ConfigError, match="A FluxPipeline does not lead away from a negative prompt"):
            sample(pipe, PROMPTS[:1], [0], negative)
        return
    led, plain = (sample(pipe, PROMPTS[:1], [0], each)[0].tobytes() for each in (negative, Sampling(steps=2)))
    assert led != plain


def test_a_contact_sheet_holds_all_pictures():
    red, blue = Image.new("RGB", (64, 32), "red"), Image.new("L", (8, 8), 255)
    sheet = contact_sheet({"first row": [red, red], "second": [blue]})
    colors = {color for _, color in sheet.getcolors(maxcolors=4096)}
    assert (255, 0, 0) in colors
    assert sheet.width >= 2 * 96  # 32 is enlarged twice
    with pytest.raises(ConfigError, match="at least one picture"):
        contact_sheet({"nothing": []})
