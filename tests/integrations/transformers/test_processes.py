"""Two processes of one run, in DDP, as torchrun starts them."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from lora_plugins import LoraModel
from tests.integrations.transformers.toys import differing, trainer, values, vit

fields = {"per_device_train_batch_size": 2, "eval_strategy": "epoch"}
straight = trainer(sys.argv[1], load_best_model_at_end=True, **fields)
straight.train()
mine = torch.cat([p.detach().flatten() for p in straight.model.parameters() if p.requires_grad])
both = [torch.zeros_like(mine) for _ in range(2)]
dist.all_gather(both, mine)
assert torch.equal(*both)
best = vit()
LoraModel.load_adapter(best, straight.state.best_model_checkpoint)
assert not differing(values(best), values(straight.model))
last = vit()
LoraModel.load_adapter(last, f"{sys.argv[1]}/checkpoint-6")
dist.barrier()
resumed = trainer(sys.argv[1], save_strategy="no", **fields)
resumed.train(resume_from_checkpoint=f"{sys.argv[1]}/checkpoint-3")
assert not differing(values(last), values(resumed.model))
print("fine")
"""


@pytest.mark.slow
def test_they_agree_and_resume(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "script.py",
        "run",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("fine") == 2
