"""Numbers that follow from others by a shift register are as good as those of torch's generator."""

import hashlib

import pytest
import torch

from lora_plugins.kernels.dropout import Dropout
from tests.core.kernels.needs import needs

shift_register = pytest.importorskip("lora_plugins.kernels.entries.shift_register")
pytestmark = needs("shift_register")


@pytest.mark.parametrize("lag", [4152, 271, 4423, 8 * 4152, 8 * 4423])  # of the generator; a difference; doubled
@pytest.mark.parametrize("p", [0.1, 0.003], ids=["bytes", "words"])
def test_numbers_that_follow_from_others_are_independent_in_pairs(lag: int, p: float):
    torch.manual_seed(2)
    draw = Dropout.draw(p)
    mask = draw.mask_like(torch.empty(1_000_000, dtype=torch.float64))
    centred, distance = mask - mask.mean(), lag * 64 // draw.bits
    correlation = (centred[:-distance] * centred[distance:]).mean() / centred.square().mean()
    assert abs(correlation) < 5 / (1_000_000 - distance) ** 0.5


def test_the_polynomial_of_the_generator_is_primitive():
    """As `2^n - 1` is prime, it is if it is irreducible: if `x` to the power of `2^n` is `x` again (n is prime too)."""
    n, k = shift_register._LONG_LAG, shift_register._SHORT_LAG
    spread = [int(f"{byte:b}", 4).to_bytes(2, "little") for byte in range(256)]  # the square of a polynomial

    def remainder(polynomial: int) -> int:
        while high := polynomial >> n:
            polynomial ^= high << n ^ high << k ^ high
        return polynomial

    power = 2  # x; bits are coefficients
    for _ in range(n):
        square = b"".join(spread[byte] for byte in power.to_bytes(n // 8 + 1, "little"))
        power = remainder(int.from_bytes(square, "little"))
    assert power == 2


@pytest.mark.parametrize(
    ("count", "wanted"), [(4423, "5125a8f47803ef9a"), (100_000, "fbcf51a33d93c234")], ids=["torch", "shifted"]
)
def test_the_numbers_of_a_seed_stay_the_same(count: int, wanted: str):
    """A run that goes on with a later version draws the masks that it would have drawn."""
    words = shift_register.shift_register_words(count, torch.Generator().manual_seed(5))
    assert hashlib.sha256(words.numpy().tobytes()).hexdigest()[:16] == wanted
