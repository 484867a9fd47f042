"""Masks are drawn again from their seed, element by element, in the memory format of their input."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from lora_plugins.kernels import disabled_kernels, dropout
from lora_plugins.kernels.dropout import Dropout, add_dropped, dropped_parts, part_of

LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: torch.empty(5, 4, 6, 5),
    "channels_last": lambda: torch.empty(5, 6, 5, 4).permute(0, 3, 1, 2),
    "images_innermost": lambda: torch.empty(4, 6, 5, 5).permute(3, 0, 1, 2),
    "images_interleaved": lambda: torch.empty(2, 3, 4, 8)[..., :4].transpose(0, 1),  # with the stride of dense ones
}


@pytest.fixture(params=["shift register", "words", "bytes"])
def generated(request, monkeypatch):
    """Draws the random numbers in each of the ways that there are, whichever this processor takes."""
    if request.param == "bytes":
        monkeypatch.setattr(dropout, "_WITHOUT_WORDS", frozenset({"cpu"}))
    with nullcontext() if request.param == "shift register" else disabled_kernels("shift_register"):
        yield


@pytest.mark.usefixtures("generated")
@pytest.mark.parametrize("p", [0.001, 0.01, 0.05, 0.1, 0.3, 0.5, 0.9])
def test_the_share_that_is_dropped(p: float):
    torch.manual_seed(0)
    draw = Dropout.draw(p)
    assert 1 - 1 / draw.scale == pytest.approx(p, rel=0.021)  # what one byte or two can express
    count = 400_000
    dropped = 1 - draw.mask_like(torch.empty(count)).mean().item()
    exact = 1 - 1 / draw.scale
    assert abs(dropped - exact) < 5 * (exact * (1 - exact) / count) ** 0.5  # five standard deviations


@pytest.mark.usefixtures("generated")
def test_elements_are_independent():
    torch.manual_seed(1)
    mask = Dropout.draw(0.3).mask_like(torch.empty(80_000, dtype=torch.float64))
    centred = mask - mask.mean()
    for distance in range(1, 17):  # within a draw of 64 bits and across draws
        correlation = (centred[:-distance] * centred[distance:]).mean() / centred.square().mean()
        assert abs(correlation) < 5 / 80_000**0.5


@pytest.mark.usefixtures("generated")
def test_every_part_of_a_large_mask_has_its_share():
    torch.manual_seed(4)
    draw, size = Dropout.draw(0.1), 8 * 9842
    parts = draw.mask_like(torch.empty(40 * size)).view(40, size)
    share = 1 / draw.scale
    assert (parts.mean(1) - share).abs().max() < 5 * (share * (1 - share) / size) ** 0.5


@pytest.mark.parametrize("p", [0.1, 0.003], ids=["bytes", "words"])
@pytest.mark.parametrize("at_once", [1, 250, 10**6], ids=["image_by_image", "two_images", "all"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_parts_make_up_the_whole_mask(p: float, at_once: int, layout: Callable[[], Tensor], monkeypatch):
    monkeypatch.setattr(dropout, "_CHUNK_ELEMENTS", at_once)
    images = layout()
    draw = Dropout.draw(p)
    whole, done = draw.mask_like(images), torch.full_like(images, 2)
    for part, mask in draw.parts(images, torch.float32):
        part_of(done, part).copy_(mask)
    assert torch.equal(done, whole)
    assert [len(mask) for _, mask in draw.parts(images[:0], torch.float32)] == [0]


@pytest.mark.usefixtures("generated")
def test_a_mask_has_the_format_of_its_input():
    image = torch.empty(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    mask = Dropout.draw(0.5).mask_like(image)
    assert mask.stride() == image.stride()
    assert set(mask.unique().tolist()) == {0.0, 1.0}


def test_the_global_generator_decides():
    torch.manual_seed(3)
    first = Dropout.draw(0.5)
    second = Dropout.draw(0.5)
    torch.manual_seed(3)
    assert Dropout.draw(0.5) == first != second


def test_a_mask_stays_the_same_when_kernels_are_switched():
    x = torch.empty(1_000_000)
    draw = Dropout.draw(0.5)
    mask = draw.mask_like(x)
    with disabled_kernels("all"):
        assert torch.equal(draw.mask_like(x), mask)


@pytest.mark.parametrize("masks", [True, False], ids=["with_masks", "without"])
@pytest.mark.parametrize("own", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_what_is_left_are_the_bits_of_a_product_with_the_mask(layout, dtype, own, masks, monkeypatch):
    monkeypatch.setattr(dropout, "_CHUNK_ELEMENTS", 250)
    torch.manual_seed(0)
    images = torch.empty_like(layout(), dtype=own).normal_()
    draw, total = Dropout.draw(0.4), torch.randn_like(images, dtype=dtype)
    left, gradient, mask = images.to(dtype) * draw.mask_like(images).to(dtype), torch.randn_like(total), None
    expected = torch.addcmul(total, gradient, draw.mask_like(total))
    for part, some, mask in dropped_parts(images, dtype, draw, masks=masks):
        assert some.dtype == dtype
        assert torch.equal(some, part_of(left, part))
        if mask is not None:
            add_dropped(part_of(total, part), part_of(gradient, part), mask)
    assert (mask is not None) == masks
    assert not masks or torch.equal(total, expected)
