"""Blocks in any order: left inside out, used as a decorator, and with a forward or a backward on one side only."""

import asyncio
import linecache
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

from lora_plugins import LoraConfig, LoraModel, StateError

X = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def headed() -> LoraModel:
    """A model whose adapter trains a head, away from its first values."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double().eval()
    lora = LoraModel(model, LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"], init="gaussian"), "a")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
    return lora


def trained(lora: LoraModel) -> list[str]:
    return [name for name, parameter in lora.model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("order", ["inside-out", "outside-in"])
def test_two_blocks_end_in_any_order(order):
    lora = headed()
    before, names = lora.model(X), trained(lora)
    first, second = ExitStack(), ExitStack()
    first.enter_context(lora.disable_adapter())
    base = lora.model(X)
    second.enter_context(lora.mixed_batch([None] * 3))
    for stack in (second, first) if order == "inside-out" else (first, second):
        assert torch.equal(lora.model(X), base)
        stack.close()
    assert torch.equal(lora.model(X), before)
    assert trained(lora) == names


def test_a_block_is_a_decorator():
    lora = headed()
    with lora.disable_adapter():
        base = lora.model(X)
    run = lora.disable_adapter()(lora.model)
    assert torch.equal(run(X), base)
    assert torch.equal(run(X), base)
    assert not torch.equal(lora.model(X), base)


def generator():
    yield 1


async def coroutine():
    return 1


async def generator_of_a_coroutine():
    yield 1


@pytest.mark.parametrize("function", [generator, coroutine, generator_of_a_coroutine], ids=lambda each: each.__name__)
def test_what_runs_after_its_call_is_not_decorated(function):
    with pytest.raises(StateError, match=rf"disable_adapter\(\) cannot decorate {function.__name__}, which runs after"):
        headed().disable_adapter()(function)


def test_a_decorated_function_that_calls_itself_stays_inside():
    lora = headed()
    with lora.disable_adapter():
        base = lora.model(X)

    @lora.disable_adapter()
    def run(depth):
        """Runs."""
        return [*(run(depth - 1) if depth else []), lora.model(X)]

    assert run.__doc__ == "Runs."
    assert all(torch.equal(output, base) for output in run(2))


def test_a_block_is_entered_again_when_it_has_ended_and_not_before():
    lora = headed()
    before, block = lora.model(X), lora.disable_adapter()
    with lora.disable_adapter():
        base = lora.model(X)
    for _ in range(2):
        with block:
            with pytest.raises(StateError, match=r"open already. Open another one inside: disable_adapter"):
                block.__enter__()
            with lora.disable_adapter():
                pass
            assert torch.equal(lora.model(X), base)
        assert torch.equal(lora.model(X), before)


@pytest.mark.parametrize("call", ["disable_adapter", "mixed_batch"])
def test_a_block_ends_wherever_its_end_is_interrupted(call):
    lora = mixable()
    open_block = {"disable_adapter": lora.disable_adapter, "mixed_batch": lambda: lora.mixed_batch([None] * 3)}[call]
    before = lora.model(X)

    def lines_of_an_end(stop: int) -> int:
        """Leaves a block, interrupted before that line of it, of whatever file; returns how many were passed."""
        passed = 0

        def trace(frame: FrameType, event: str, _: object) -> Any:
            nonlocal passed
            source = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
            if event == "line" and source.strip() != "try:":  # which does nothing, so that no signal comes there
                passed += 1
                if passed == stop:
                    raise KeyboardInterrupt
            return trace

        block = open_block()
        block.__enter__()
        tracing = sys.gettrace()
        sys.settrace(trace)
        try:
            block.__exit__(None, None, None)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(tracing)
        return passed

    lines = lines_of_an_end(0)
    assert lines > 10
    for stop in range(1, lines, 7):
        lines_of_an_end(stop)
        assert torch.equal(lora.model(X), before), stop


def test_a_backward_inside_is_refused_where_a_head_was_trained():
    lora = headed()
    loss = lora.model(X).sum()
    refused = "no gradient to '2.bias', which was trained|modified by an inplace operation"
    with lora.disable_adapter(), pytest.raises(RuntimeError, match=refused):
        loss.backward()


def test_a_backward_that_would_lose_a_gradient_names_the_parameter():
    lora = headed()
    loss = lora.model[2].bias.sum()
    with lora.disable_adapter(), pytest.raises(StateError, match=r"no gradient to .2\.bias., which was trained"):
        loss.backward()


def test_a_backward_inside_is_right_where_only_factors_are_trained():
    model = nn.Sequential(nn.Linear(4, 6)).double()
    lora = LoraModel(model, LoraConfig(r=2, init="gaussian"))
    expected = torch.autograd.grad(model(X).sum(), [p for p in model.parameters() if p.requires_grad])
    loss = model(X).sum()
    with lora.disable_adapter():
        loss.backward()
    for parameter, gradient in zip([p for p in model.parameters() if p.requires_grad], expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_a_backward_after_the_block_is_that_of_the_forward_before():
    lora = headed()
    parameters = [p for p in lora.model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(lora.model(X).sum(), parameters)
    loss = lora.model(X).sum()
    with lora.disable_adapter(), torch.no_grad():
        lora.model(X)
    for found, gradient in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
        assert torch.equal(found, gradient)


def test_a_backward_after_the_block_of_a_forward_inside_is_no_other_number():
    lora = headed()
    x = X.clone().requires_grad_()
    with lora.disable_adapter():
        loss = lora.model(x).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("gradients", [True, False], ids=["with-gradients", "without"])
def test_training_mode_in_a_mixed_batch_is_refused_even_for_rows_of_the_base(gradients):
    lora = headed()
    with lora.mixed_batch([None] * 3), torch.set_grad_enabled(gradients):
        lora.model.train()
        with pytest.raises(StateError, match=r"inside mixed_batch\(\), which is for inference"):
            lora.model(X)


def test_what_was_frozen_is_trained_again_without_a_guard():
    lora = headed()
    lora.add_adapter("b", LoraConfig(r=1, target_modules=["0"]))
    lora.set_adapter("b")
    lora.set_adapter("a")
    lora.model(X).sum().backward()
    assert all(p.grad is not None and not p._backward_hooks for p in lora.model.parameters() if p.requires_grad)


def test_a_parameter_that_the_user_thaws_gets_its_gradient():
    lora = headed()
    bias = lora.model[0].bias
    bias.requires_grad_(True)
    lora.model(X).sum().backward()
    assert bias.grad is not None


BLOCKS = {
    "disable_adapter": lambda lora: lora.disable_adapter(),
    "mixed_batch": lambda lora: lora.mixed_batch(["a"] * 3),
}
opens = pytest.mark.parametrize("opens", BLOCKS.values(), ids=BLOCKS)
opens_another = pytest.mark.parametrize("opens_another", BLOCKS.values(), ids=BLOCKS)


def mixable() -> LoraModel:
    """A model with a second adapter; neither trains a head."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double().eval()
    lora = LoraModel(model, LoraConfig(r=2, target_modules=["0"], init="none"), "a")
    lora.add_adapter("b", LoraConfig(r=2, target_modules=["2"], init="none"))
    return lora


@opens
@opens_another
class TestThreadsAndTasks:
    """Two of them inside blocks computed each what the other's block says."""

    def test_a_thread_is_refused_while_another_one_is_inside(self, opens, opens_another):
        lora = mixable()

        def inside():
            with opens_another(lora):
                return lora.model(X)

        with ThreadPoolExecutor(1) as pool:
            expected = pool.submit(inside).result()
            with opens(lora), pytest.raises(StateError, match="another thread or task is inside"):
                pool.submit(inside).result()
            assert torch.equal(pool.submit(inside).result(), expected)

    def test_threads_with_a_lock_compute_their_own(self, opens, opens_another):
        lora, lock = mixable(), threading.Lock()
        with opens(lora):
            expected = [lora.model(X)]
        with opens_another(lora):
            expected.append(lora.model(X))

        def call(which):
            for _ in range(20):
                with lock, (opens, opens_another)[which](lora):
                    assert torch.equal(lora.model(X), expected[which])

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(call, [0, 1, 0, 1]))

    def test_a_task_is_refused_while_another_one_waits_inside(self, opens, opens_another):
        lora = mixable()

        async def wait_inside(entered, ended):
            with opens(lora):
                entered.set()
                await ended.wait()

        async def both():
            entered, ended = asyncio.Event(), asyncio.Event()
            other = asyncio.create_task(wait_inside(entered, ended))
            await entered.wait()
            with pytest.raises(StateError, match="another thread or task is inside"), opens_another(lora):
                pass
            ended.set()
            await other
            with opens_another(lora):
                pass

        asyncio.run(both())

    def test_what_a_task_starts_may_open_blocks_inside(self, opens, opens_another):
        lora = mixable()

        def inside():
            with opens_another(lora):
                return lora.model(X)

        async def start():
            with opens(lora):
                return await asyncio.to_thread(inside)

        assert torch.equal(asyncio.run(start()), inside())


@opens
def test_a_pool_calls_the_model_inside_a_block(opens):
    lora = mixable()
    with opens(lora):
        expected = lora.model(X)
        with ThreadPoolExecutor(2) as pool:
            assert all(torch.equal(found, expected) for found in pool.map(lora.model, [X] * 8))


def test_threads_that_ask_until_they_may_each_have_the_base():
    """A block that was opened in the middle of the end of another had the values that this one put back."""
    lora = headed()
    with lora.disable_adapter():
        base = lora.model[2].weight.detach().clone()
    before = lora.model(X)
    interval = sys.getswitchinterval()

    def ask(_):
        inside = 0
        for _ in range(20_000):  # a few hundred are enough
            with suppress(StateError), lora.disable_adapter():
                assert torch.equal(lora.model[2].weight, base)
                inside += 1
            if inside == 100:
                return
        raise AssertionError(f"inside {inside} times")

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(ask, range(2)))
    finally:
        sys.setswitchinterval(interval)
    assert torch.equal(lora.model(X), before)
