"""A rescaled layer that keeps its output has the gradients of one that does not, whatever happens to that output."""

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora_plugins.kernels import disabled_kernels, lora_rescaled
from lora_plugins.plugins import Rescaling
from tests.core.kernels.needs import needs
from tests.core.kernels.update import LowRank

pytestmark = needs("fused_rescaled")

TIGHT = {"rtol": 1e-12, "atol": 1e-12}

SHAPES = {"wide": (12, 40), "small": (40, 12), "square": (24, 24), "narrow": (24, 18)}
"""Inputs and outputs."""

FOLLOWERS: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda y: y,
    "what_keeps_it": F.gelu,
    "relu": F.relu_,
    "sum": lambda y: y.add_(1.0),
    "product": lambda y: y.mul_(y.detach().cos()),
    "part": lambda y: (y[:, 1:].zero_(), y)[1],
    "other_data": lambda y: (setattr(y, "data", y.detach().cos()), y)[1],
    "unseen": lambda y: (y.data.mul_(0.5), y)[1],
    "unseen_element": lambda y: (y.data[0, 0, :1].zero_(), y)[1],
    "unseen_part": lambda y: torch.unsafe_chunk(y, 2, dim=-1)[0].mul_(3.0),
}
"""What comes behind a layer."""

shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
followers = pytest.mark.parametrize("follow", FOLLOWERS.values(), ids=FOLLOWERS)

Given = dict[str, Tensor]


def tensors(shape: tuple[int, int], dtype: torch.dtype = torch.float64, rows: int = 200) -> Given:
    """All that a layer has: the weight is frozen."""
    inputs, outputs = shape
    torch.manual_seed(0)
    sizes = {"x": (2, rows // 2, inputs), "bias": (outputs,), "A": (2, inputs), "B": (outputs, 2)}
    given = {name: torch.randn(size, dtype=dtype) for name, size in sizes.items()}
    given["magnitude"] = torch.rand(outputs, dtype=dtype) + 0.5
    for tensor in given.values():
        tensor.requires_grad_()
    return {**given, "weight": torch.randn(outputs, inputs, dtype=dtype)}


def of_the_norm(direction: Tensor, magnitude: Tensor) -> Tensor:
    return magnitude / torch.linalg.vector_norm(direction, dim=1)


def output(given: Given, x: Tensor | None = None) -> Tensor:
    update, rescaling = LowRank(given["A"], given["B"]), Rescaling((given["magnitude"],), of_the_norm)
    return lora_rescaled(given["x"] if x is None else x, given["weight"], given["bias"], update, rescaling, None)


def gradients(y: Tensor, given: Given, **options: bool) -> Given:
    names = [name for name, tensor in given.items() if tensor.requires_grad]
    found = torch.autograd.grad(y.sin().sum(), [given[name] for name in names], **options)
    return dict(zip(names, found, strict=True))


def by_the_law(given: Given, follow: Callable[[Tensor], Tensor] = lambda y: y) -> Given:
    with disabled_kernels("fused_rescaled"):
        return gradients(follow(output(given)), given)


def keeps_output(given: Given) -> bool:
    kept: list[int] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor.untyped_storage().data_ptr()) or tensor, lambda t: t):
        y = output(given)
    return y.untyped_storage().data_ptr() in kept


@shapes
@followers
def test_what_follows_may_write_into_it(shape, follow):
    given = tensors(shape)
    torch.testing.assert_close(gradients(follow(output(given)), given), by_the_law(given, follow), **TIGHT)


@pytest.mark.parametrize("rows", [2, 200])
def test_its_memory_may_be_freed(rows):
    given = tensors(SHAPES["wide"], rows=rows)
    y = output(given)
    doubled = 2.0 * y
    y.untyped_storage().resize_(0)
    torch.testing.assert_close(gradients(doubled, given), by_the_law(given, lambda y: 2.0 * y), **TIGHT)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_kept_where_that_costs_little(shape):
    assert keeps_output(tensors(SHAPES[shape])) == (shape in ("wide", "small"))


@pytest.mark.parametrize("frozen", [["magnitude"], ["x", "bias", "A", "B", "magnitude"]], ids=["magnitude", "all"])
def test_it_is_not_kept_for_nothing(frozen):
    given = tensors(SHAPES["wide"])
    assert not keeps_output({**given, **{name: given[name].detach() for name in frozen}})


@pytest.mark.parametrize("frozen", ["x", "bias", "A", "B", "magnitude"])
@shapes
def test_what_needs_no_gradient(shape, frozen):
    given = tensors(shape)
    expected = by_the_law(given)
    given[frozen] = given[frozen].detach()
    del expected[frozen]
    torch.testing.assert_close(gradients(output(given), given), expected, **TIGHT)


def test_without_a_bias():
    given = tensors(SHAPES["wide"])
    given["bias"] = None
    leaves = [given[name] for name in ("x", "A", "B", "magnitude")]
    got = torch.autograd.grad(output(given).sin().sum(), leaves)
    with disabled_kernels("fused_rescaled"):
        expected = torch.autograd.grad(output(given).sin().sum(), leaves)
    torch.testing.assert_close(got, expected, **TIGHT)


HOOKS = {
    "none": nullcontext,
    "same": partial(saved_tensors_hooks, lambda tensor: tensor, lambda tensor: tensor),
    "copied": partial(saved_tensors_hooks, lambda tensor: tensor.clone(), lambda tensor: tensor),
    "copied_late": partial(saved_tensors_hooks, lambda tensor: tensor, lambda tensor: tensor.clone()),
    "columns": partial(
        saved_tensors_hooks, lambda tensor: tensor.movedim(-1, 0).contiguous().movedim(0, -1), lambda tensor: tensor
    ),
    "on_cpu": save_on_cpu,
}


@followers
@pytest.mark.parametrize("hooks", HOOKS.values(), ids=HOOKS)
def test_hooks_of_saved_tensors(follow, hooks):
    given = tensors(SHAPES["wide"])
    with hooks():
        y = output(given)
    torch.testing.assert_close(gradients(follow(y), given), by_the_law(given, follow), **TIGHT)


@followers
@pytest.mark.parametrize("reentrant", [False, True], ids=["new", "reentrant"])
@pytest.mark.parametrize("behind", [False, True], ids=["within", "behind"])
def test_checkpointing(follow, reentrant, behind):
    given = tensors(SHAPES["wide"])
    expected = by_the_law(given, follow)
    outputs = partial(output, given) if behind else lambda x: follow(output(given, x))
    y = checkpoint(outputs, given["x"], use_reentrant=reentrant)
    (follow(y) if behind else y).sin().sum().backward()
    torch.testing.assert_close({name: given[name].grad for name in expected}, expected, **TIGHT)


@pytest.mark.parametrize("magnitude", [0.0, 1e-320, 1e-200, 1e-5, -1.0, 1e200], ids=str)
def test_magnitudes_of_any_size(magnitude):
    given = tensors(SHAPES["wide"])
    with torch.no_grad():
        given["magnitude"][::3] = magnitude
        given["bias"][::2] = 0.0
    torch.testing.assert_close(gradients(output(given), given), by_the_law(given), rtol=1e-9, atol=1e-9)


def test_a_bias_that_has_changed_since():
    given = tensors(SHAPES["wide"])
    expected, y = by_the_law(given), output(given)
    with torch.no_grad():
        given["bias"].add_(1.0)
    torch.testing.assert_close(gradients(y, given), expected, **TIGHT)


def test_a_backward_may_run_twice():
    given = tensors(SHAPES["wide"])
    y = output(given)
    first = gradients(y, given, retain_graph=True)
    torch.testing.assert_close(gradients(y, given), first, rtol=0, atol=0)


def test_it_may_be_written_into_between_two_backwards():
    given = tensors(SHAPES["wide"])
    y = output(given)
    leaves = [given[name] for name in ("x", "A", "B", "magnitude")]
    first = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    with torch.no_grad():
        y.zero_()
    torch.testing.assert_close(torch.autograd.grad(y.sum(), leaves), first, **TIGHT)


def test_it_is_let_go_by_a_backward_that_does_without():
    given, returned = tensors(SHAPES["wide"]), []

    def unpack(tensor: Tensor) -> Tensor:
        returned.append(weakref.ref(again := tensor.clone()))
        return again

    with saved_tensors_hooks(lambda tensor: tensor, unpack):
        y = output(given)
    torch.autograd.grad(y, given["A"], torch.ones(1, *y.shape, dtype=y.dtype), is_grads_batched=True)
    assert returned
    assert not any(some() is not None for some in returned)


def test_a_backward_that_was_broken_off():
    given = tensors(SHAPES["wide"])
    y = output(given)

    def fails(_: Tensor) -> None:
        raise ValueError("enough")

    handle = given["x"].register_hook(fails)
    with pytest.raises(ValueError, match="enough"):
        gradients(y, given, retain_graph=True)
    handle.remove()
    torch.testing.assert_close(gradients(y, given), by_the_law(given), **TIGHT)


@shapes
def test_second_derivatives(shape):
    given = tensors(shape, rows=10)
    seconds = []
    for kernels in ((), ("fused_rescaled",)):
        with disabled_kernels(*kernels):
            first = gradients(output(given), given, create_graph=True)
            seconds.append(gradients(torch.cat([value.flatten() for value in first.values()]), given))
    torch.testing.assert_close(*seconds, **TIGHT)


def test_many_gradients_at_once():
    given = tensors(SHAPES["wide"])
    y, dy = output(given), torch.randn(3, 2, 100, 40, dtype=torch.float64)
    leaves = [given[name] for name in ("x", "A", "magnitude")]
    together = torch.autograd.grad(y, leaves, dy, retain_graph=True, is_grads_batched=True)
    alone = [torch.autograd.grad(y, leaves, some, retain_graph=True) for some in dy]
    torch.testing.assert_close(together, tuple(torch.stack(some) for some in zip(*alone, strict=True)), **TIGHT)


@shapes
@pytest.mark.parametrize("bias", [1.0, 100.0], ids=["bias", "large_bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_half_precision_is_near_float32(shape, bias, dtype, how):
    given = tensors(shape, torch.float32)
    with torch.no_grad():
        given["bias"].mul_(bias)
    half = {name: tensor.detach().clone().requires_grad_(tensor.requires_grad) for name, tensor in given.items()}
    if how == "weights":
        for name in ("x", "bias", "weight"):
            half[name] = half[name].detach().to(dtype).requires_grad_(half[name].requires_grad)
    with torch.autocast("cpu", dtype, enabled=how == "autocast"):
        y = output(half)
    dy = torch.randn(y.shape)
    wanted = torch.autograd.grad(output(given), [given[name] for name in ("x", "bias", "A", "B", "magnitude")], dy)
    got = torch.autograd.grad(y, [half[name] for name in ("x", "bias", "A", "B", "magnitude")], dy.to(dtype))
    for ours, theirs in zip(got, wanted, strict=True):
        error, size = (ours.float() - theirs).norm(), theirs.norm()
        assert error <= 0.02 * size, (error, size)  # some roundings to 8 bits each
