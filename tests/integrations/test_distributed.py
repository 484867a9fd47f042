"""Two processes over gloo: equal weights on both ranks, small files, exact resume, or a refusal by name."""

import subprocess
import sys

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from lora_plugins import LoraModel, StateError
from lora_plugins.integrations.lightning import LoraCallback, load_from_checkpoint
from tests.integrations.distributed_runs import NoNorm
from tests.integrations.toys import CONFIG, differing, load, loader, trainer, values


def launch(name, folder, code=0):
    command = [sys.executable, "-m", "tests.integrations.distributed_runs", name, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert (done.returncode == 0) == (code == 0), done.stderr[-4000:]
    return done.stderr


def dump(folder, name, rank):
    return torch.load(folder / f"{name}-{rank}.pt")


def test_ddp(tmp_path):
    launch("ddp", tmp_path)
    for name in ("straight", "half", "resumed", "merged", "merged-state"):
        assert not differing(dump(tmp_path, name, 0), dump(tmp_path, name, 1)), name
    assert not differing(dump(tmp_path, "straight", 0), dump(tmp_path, "resumed", 0))
    assert set(load(tmp_path / "half.ckpt")["state_dict"]) == set(dump(tmp_path, "half", 0))
    alone = load_from_checkpoint(NoNorm, tmp_path / "half.ckpt")
    assert not differing({k: values(alone)[k] for k in dump(tmp_path, "half", 0)}, dump(tmp_path, "half", 0))
    again = NoNorm()
    LoraModel.load_adapter(again, tmp_path / "adapter").merge_and_unload()
    assert not differing(values(again), dump(tmp_path, "merged-state", 0))


@pytest.mark.slow
def test_ddp_names_what_is_unused(tmp_path):
    error = launch("unused", tmp_path, code=1)
    assert "spare" in error


@pytest.mark.slow
def test_spawned_processes_bring_the_merged_weights_back(tmp_path):
    said = launch("spawned", tmp_path)
    merged, lost = (torch.load(tmp_path / f"spawned-state-{merge}.pt") for merge in (True, False))
    assert differing(merged, values(NoNorm())) == {"net.0.weight", "net.3.weight"}
    assert not differing(lost, values(NoNorm()))
    assert "will have no adapter" in said


SHARDED = {"fsdp2": lambda: ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)}


@pytest.mark.parametrize("strategy", SHARDED.values(), ids=SHARDED.keys())
def test_strategies_that_shard_are_refused_in_setup(tmp_path, strategy):
    module = NoNorm()
    module.configure_model = lambda: None
    try:
        with pytest.raises(StateError, match="ModelParallelStrategy"):
            trainer(tmp_path, [LoraCallback(CONFIG)], strategy=strategy()).fit(module, loader())
    finally:
        torch.distributed.destroy_process_group()  # Lightning leaves it to the end of the process
    assert not differing(values(module), values(NoNorm()))
