"""The operator of convolutions that compilers are given: what eager mode computes, in one graph."""

import pytest
import torch
from torch import Tensor

from lora_plugins.kernels import disabled_kernels
from tests.core.kernels.conv_cases import CASES, ONE_OF_EACH_PATH, WITHOUT_DROPOUT, Case, conv, in_both_formats
from tests.core.kernels.graphs import EQUAL, both, compiled
from tests.core.kernels.needs import needs
from tests.slow import slow_but

pytestmark = [
    needs("fused_conv", "fused_linear"),  # eager mode computes pointwise ones as linear layers
    pytest.mark.usefixtures("compiler_as_new"),
]

one_of_each_path = pytest.mark.parametrize("case", slow_but(CASES, ONE_OF_EACH_PATH), ids=lambda case: case.id)
"""All are in the slow tests."""

formats = in_both_formats(CASES, fast=ONE_OF_EACH_PATH)
without_dropout = in_both_formats(WITHOUT_DROPOUT, fast=ONE_OF_EACH_PATH)


def call(case: Case):
    """As `Case.compute`, whose seed a compiler cannot trace."""

    def compute(*inputs: Tensor) -> Tensor:
        return conv(case.geometry, *inputs, 1.7, case.dropout)

    return compute


def operators(case: Case) -> int:
    """How often a graph of a training step takes the operator."""
    return int(case.dropout > 0 or case.groups > 1)


@formats
def test_outputs_and_gradients_are_those_of_eager_mode(case, last):
    inputs = case.tensors(channels_last=last)
    compiled, eager = both(call(case), inputs, expected=operators(case))
    torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=1e-12)
    assert compiled[1].stride() == inputs[0].stride()


@one_of_each_path
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast(case, base):
    x, weight, bias, A, B = case.tensors(torch.float32)
    weight, bias = (tensor.detach().to(base).requires_grad_() for tensor in (weight, bias))
    check_in_half_precision(case, [x, weight, bias, A, B], torch.bfloat16)


@one_of_each_path
@pytest.mark.parametrize("needed", slow_but(range(5), [0, 3]), ids=["x", "weight", "bias", "A", "B"])
def test_one_gradient_alone(case, needed):
    inputs = [tensor.detach().requires_grad_(i == needed) for i, tensor in enumerate(case.tensors())]
    found = both(call(case), inputs, [needed], expected=operators(case))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@one_of_each_path
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_wide_factors_of_a_base_in_half_precision(case, dtype):
    x, weight, bias, *factors = case.tensors(torch.float32)
    half = [tensor.detach().to(dtype).requires_grad_() for tensor in (x, weight, bias)]
    check_in_half_precision(case, [*half, *factors])


def check_in_half_precision(case: Case, inputs: list[Tensor], dtype: torch.dtype | None = None) -> None:
    def loss(output: Tensor) -> Tensor:  # not a sine, which would make much of the rounding of its argument
        return output.float().square().mean()

    for one, other in zip(*both(call(case), inputs, dtype=dtype, expected=operators(case), loss=loss), strict=True):
        assert one.dtype == other.dtype
        # bfloat16 has 8 bits, and eager mode may round at another place
        assert (one - other).float().norm() <= 0.02 * other.float().norm()


@without_dropout
def test_in_inference_a_graph_has_ordinary_operations(case, last):
    inputs = case.tensors(channels_last=last)
    with torch.no_grad():
        found = compiled(call(case), expected=0)(*inputs)
    torch.testing.assert_close(found, case.law(*inputs), rtol=1e-12, atol=1e-12)


# torch 2.15 warns of what its own check does.
unwarned = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@unwarned
@pytest.mark.parametrize("case", ONE_OF_EACH_PATH, ids=lambda case: case.id)
@pytest.mark.parametrize(
    "last", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["contiguous", "channels_last"]
)
def test_the_operator_is_what_torch_expects_of_one(case, last):
    check_operator(case, last, keep=True)


@unwarned
@pytest.mark.slow
@formats
@pytest.mark.parametrize("keep", [False, True], ids=["nothing_kept", "kept"])
def test_the_operator_of_any_convolution_is_what_torch_expects_of_one(case, last, keep):
    check_operator(case, last, keep)


def check_operator(case: Case, last: bool, keep: bool) -> None:
    x, weight, bias, A, B = case.tensors(channels_last=last)
    seed = torch.tensor(5) if case.dropout else None
    move = (case.geometry.stride, case.geometry.padding, case.geometry.dilation, case.geometry.groups)
    arguments = (x, weight, bias, A, B, seed, 1.7, case.dropout, *move, keep)
    torch.library.opcheck(torch.ops.lora_plugins.conv, arguments)


@without_dropout
def test_without_kernels_a_graph_has_ordinary_operations(case, last):
    inputs = case.tensors(channels_last=last)
    with disabled_kernels("fused_conv"):
        found = compiled(call(case), expected=0)(*inputs)
    torch.testing.assert_close(found, case.law(*inputs), **EQUAL)
