"""Threads that each work on a model of their own do not see one another."""

import copy
import gc
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from lora_plugins import LoraConfig, LoraModel
from lora_plugins.adapter import InitData


@pytest.fixture
def switching_often():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def life(seed, folder):
    """What a model computes in the states of its life, all of it drawn from a seed."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    config = LoraConfig(r=2, target_modules=["0", "2"], modules_to_save=["4"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(draw(*parameter.shape) / 8)
        lora = LoraModel(model, config)
        for parameter in [p for p in model.parameters() if p.requires_grad]:
            parameter.copy_(draw(*parameter.shape) / 8)
    x = draw(2, 3, 6, 6)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    lora.save_adapter(folder / str(seed))
    with torch.no_grad():
        found = [model(x)]
        with lora.disable_adapter():
            found.append(model(x))
        model.eval()
        lora.merge_adapter()
        found.append(model(x))
        lora.unmerge_adapter()
        found += [copy.deepcopy(model)(x), lora.merge_and_unload()(x)]
    return found


@pytest.mark.usefixtures("switching_often")
def test_each_computes_what_it_computes_alone(tmp_path):
    """The collector, which changes of a model hold up, goes on as well: two threads left it off for good."""
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda seed: life(seed, tmp_path / "together"), range(16)))
    assert gc.isenabled()
    for seed, found in enumerate(together):
        alone = life(seed, tmp_path / "alone")
        assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
def test_threads_that_learn_from_data_draw_what_each_draws_alone(init, switching_often):
    def built(seed):
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters(), seed):
                parameter.copy_(torch.arange(1.0, 1 + parameter.numel()).view_as(parameter).mul(number).sin())
        return model

    def adapted(seed, model):
        data = InitData([torch.eye(6, dtype=torch.float64) + seed], step=lambda model, x: model(x).square().sum())
        LoraModel(model, LoraConfig(r=2, init=init), init_data=data)
        return model.state_dict()

    of_the_run = torch.initial_seed()
    alone = [adapted(seed, built(seed)) for seed in range(9)]
    models = [built(seed) for seed in range(9)]  # not in a thread: layers draw from the generator that all share
    with ThreadPoolExecutor(3) as pool:
        torch.testing.assert_close(list(pool.map(adapted, range(9), models)), alone, rtol=0, atol=0)
    assert torch.initial_seed() == of_the_run
