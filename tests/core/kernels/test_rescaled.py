"""A layer with a rescaled weight computes its law, whatever computes it: linear layers and convolutions."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_plugins.kernels import Geometry, disabled_kernels, lora_rescaled
from lora_plugins.plugins import Rescaling
from tests.core.kernels.update import LowRank

TIGHT = {"rtol": 1e-12, "atol": 1e-12}

GEOMETRIES = {
    "linear": (None, (3, 4, 6), (5, 6)),
    "linear-one_row": (None, (6,), (5, 6)),
    "linear-no_row": (None, (0, 6), (5, 6)),
    "conv2d": (Geometry((2, 1), (1, 0), (1, 2), 1), (2, 3, 7, 8), (4, 3, 3, 2)),
    "conv2d-pointwise": (Geometry((1, 1), (0, 0), (1, 1), 1), (2, 6, 4, 3), (5, 6, 1, 1)),
    "conv2d-grouped": (Geometry((1, 1), (1, 1), (1, 1), 2), (2, 4, 5, 5), (6, 2, 3, 3)),
    "conv2d-depthwise": (Geometry((1, 1), (2, 2), (1, 1), 4), (2, 4, 6, 6), (4, 1, 5, 5)),
    "conv1d": (Geometry((1,), (1,), (1,), 1), (2, 4, 9), (5, 4, 3)),
}

geometries = pytest.mark.parametrize(("geometry", "inputs", "weight"), GEOMETRIES.values(), ids=GEOMETRIES)
drops = pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["no_dropout", "dropout"])


def of_the_norm(direction: Tensor, magnitude: Tensor) -> Tensor:
    return magnitude / torch.linalg.vector_norm(direction, dim=1)


def constant(direction: Tensor, magnitude: Tensor) -> Tensor:
    """Whose derivative by the direction is none, as the law says."""
    return magnitude.sin()


def tensors(inputs: tuple[int, ...], weight: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, weight, bias, A, B and the magnitude."""
    torch.manual_seed(0)
    columns = torch.Size(weight[1:]).numel()
    shapes = [inputs, weight, weight[:1], (2, columns), (weight[0], 2), weight[:1]]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def call(geometry: Geometry | None, dropout: float = 0.0, factors=of_the_norm, low_memory: bool = False):
    def run(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, magnitude: Tensor) -> Tensor:
        torch.manual_seed(7)
        update, rescaling = LowRank(A, B, 1.7, dropout, low_memory), Rescaling((magnitude,), factors)
        return lora_rescaled(x, weight, bias, update, rescaling, geometry)

    return run


@geometries
@drops
def test_gradients_of_first_and_second_order(geometry, inputs, weight, dropout):
    given = tensors(inputs, weight)
    assert torch.autograd.gradcheck(call(geometry, dropout, constant), given, fast_mode=True)
    assert torch.autograd.gradgradcheck(call(geometry, dropout, constant), given, fast_mode=True)


@geometries
@drops
def test_a_graph_of_the_gradients_has_the_same_gradients(geometry, inputs, weight, dropout):
    given = tensors(inputs, weight)
    y = call(geometry, dropout)(*given)
    plain = torch.autograd.grad(y.sin().sum(), given, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(y.sin().sum(), given, create_graph=True), plain, **TIGHT)


@geometries
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_it_is_the_law(geometry, inputs, weight, bias):
    x, W, b, A, B, m = tensors(inputs, weight)
    b = b if bias else None
    V = W + 1.7 * (B @ A).view_as(W)
    whole = (m / V.detach().flatten(1).norm(dim=1)).view(-1, *[1] * (W.ndim - 1)) * V
    expected = F.linear(x, whole, b) if geometry is None else geometry.convolve(x, whole, b)
    output = call(geometry)(x, W, b, A, B, m)
    torch.testing.assert_close(output, expected, **TIGHT)
    leaves = [tensor for tensor in (x, W, b, A, B, m) if tensor is not None]
    got, wanted = (torch.autograd.grad(y.sin().sum(), leaves) for y in (output, expected))
    torch.testing.assert_close(got, wanted, **TIGHT)


@geometries
@drops
@pytest.mark.parametrize("needed", range(6), ids=["x", "weight", "bias", "A", "B", "magnitude"])
def test_one_gradient_alone_is_the_same(geometry, inputs, weight, dropout, needed):
    given = tensors(inputs, weight)
    expected = torch.autograd.grad(call(geometry, dropout)(*given).sin().sum(), given)
    alone = [tensor.detach().requires_grad_(i == needed) for i, tensor in enumerate(given)]
    (gradient,) = torch.autograd.grad(call(geometry, dropout)(*alone).sin().sum(), [alone[needed]])
    torch.testing.assert_close(gradient, expected[needed], **TIGHT)


@geometries
def test_rows_that_nearly_vanish_are_exact(geometry, inputs, weight):
    """Where the update cancels all but 1e-5 of the weight, a norm from its factors would have no digit left."""
    given = tensors(inputs, weight, torch.float32)
    with torch.no_grad():
        W, A, B = given[1], given[3], given[4]
        W.copy_((-1.7 * (B @ A)).view_as(W)).add_(torch.randn_like(W), alpha=1e-5)
    wide = [tensor.detach().double().requires_grad_() for tensor in given]
    got, wanted = call(geometry)(*given).detach(), call(geometry)(*wide).detach()
    # Of one part in 1e5, float32 has two digits; a wrong norm would be off by all of them.
    torch.testing.assert_close(
        got.double(), wanted, rtol=0.1, atol=0.1 * float(wanted.abs().sum()) / max(wanted.numel(), 1)
    )


@geometries
@drops
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_half_precision_is_near_float32(geometry, inputs, weight, dropout, dtype, how):
    given = [tensor.detach().requires_grad_() for tensor in tensors(inputs, weight, torch.float32)]
    half = [
        tensor.detach().to(dtype if how == "weights" and i < 3 else torch.float32) for i, tensor in enumerate(given)
    ]
    half = [tensor.requires_grad_() for tensor in half]
    expected = call(geometry, dropout)(*given)
    with torch.autocast("cpu", dtype, enabled=how == "autocast"):
        output = call(geometry, dropout)(*half)
    assert output.dtype == dtype
    of_output = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, given, of_output)
    got = torch.autograd.grad(output, half, of_output.to(dtype))
    for ours, theirs in zip([output, *got], [expected, *wanted], strict=True):
        assert ours.isfinite().all()
        error, size = (ours.float() - theirs).norm(), theirs.norm()
        assert error <= 0.02 * size, (error, size)  # some roundings to 8 bits each


@geometries
@drops
def test_ordinary_operations_and_the_kernel_agree(geometry, inputs, weight, dropout):
    given = tensors(inputs, weight)
    means = []
    for off in ((), ("all",)):
        with disabled_kernels(*off):
            update, rescaling = LowRank(*given[3:5], dropout=dropout), Rescaling(given[5:], of_the_norm)
            outputs = [lora_rescaled(*given[:3], update, rescaling, geometry) for _ in range(400)]
            means.append(torch.stack(outputs).mean(0).detach())
    untouched = F.linear(*given[:3]) if geometry is None else geometry.convolve(*given[:3])
    assert (means[0] - means[1]).abs().sum() <= 0.2 * (call(geometry)(*given) - untouched).abs().sum()


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@drops
def test_memory_formats(channels_last, dropout):
    geometry, inputs, weight = GEOMETRIES["conv2d"]
    given = tensors(inputs, weight)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    laid_out = [t.detach().contiguous(memory_format=layout) if t.ndim == 4 else t.detach() for t in given]
    laid_out = [tensor.requires_grad_() for tensor in laid_out]
    results = []
    for some in (given, laid_out):
        output = call(geometry)(*some)
        results.append([output, *torch.autograd.grad(output.sin().sum(), some)])
    torch.testing.assert_close(*results, **TIGHT)
    output = call(geometry, dropout)(*laid_out)
    assert output.isfinite().all()


def test_what_follows_may_write_into_the_output():
    given = tensors((3, 4, 6), (5, 6))
    expected = call(None)(*given).relu().sum()
    expected_gradients = torch.autograd.grad(expected, given)
    got = torch.autograd.grad(call(None)(*given).relu_().sum(), given)
    torch.testing.assert_close(got, expected_gradients, **TIGHT)
