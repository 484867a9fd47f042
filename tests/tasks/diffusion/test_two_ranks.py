"""A run on two ranks: each picture is on one of them, and both have the same adapter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_plugins.integrations.diffusers import LoraPipeline, load_pipeline
from tests.integrations.diffusers.pipelines import build


@pytest.mark.slow  # its port can be taken by another test that starts processes at the same time
@pytest.mark.timeout(600)
def test_two_ranks_train_one_adapter(tmp_path, picture_folder):
    build("Stable Diffusion").save_pretrained(tmp_path / "base")
    picture_folder(*[(16, 16)] * 4)
    root = Path(__file__).parents[3]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.tasks.diffusion.two_ranks", str(tmp_path)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    advised = [line for line in done.stderr.splitlines() if "sync_dist" in line]
    assert [line for line in advised if "class_loss" not in line] == []  # which other processes may not have
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(2)]
    (first_names, first, batches, noise), (second_names, second, _, other_noise) = ranks
    assert batches == 2
    assert noise != other_noise
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    for epoch in (slice(0, 2), slice(2, 4)):
        assert sorted(name for names in (*first_names[epoch], *second_names[epoch]) for name in names) == sorted(
            f"{tmp_path}/pictures/{number}.png@16x16" for number in range(4)
        )
    assert len(list((tmp_path / "class").glob("*.png"))) == 2
    assert (tmp_path / "samples" / "after.png").is_file()
    saved = LoraPipeline.load_adapter(load_pipeline(tmp_path / "base"), tmp_path / "adapter").pack("default").tensors
    assert all(torch.equal(tensor, saved[name]) for name, tensor in first.items())
