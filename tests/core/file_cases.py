"""A small model, adapted and saved, and how to damage what was saved."""

import hashlib
import json

import safetensors.torch
import torch
from hypothesis import HealthCheck, settings
from torch import nn

from lora_plugins import LoraConfig, LoraModel
from lora_plugins.files import MANIFEST
from lora_plugins.files.manifest import sealed

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Net(nn.Module):
    """A little of everything: a convolution, statistics, a fused projection, and a head."""

    def __init__(self, classes=3, width=6):
        super().__init__()
        self.stem = nn.Conv2d(2, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width)
        self.head = nn.Linear(3 * width, classes)

    def forward(self, x):
        x = self.norm(self.stem(x)).mean(dim=(2, 3))
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(self.qkv(x))


def build(seed=3, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net(**options).eval()


def adapt(model, name="default", **fields):
    """Adapts a model and moves everything that training would move."""
    fields = {"r": 2, "target_modules": ["stem", "blocks.0", "blocks.1", "qkv"], "init": "none", **fields}
    lora = LoraModel(model, LoraConfig(**fields), name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in key:
                parameter.add_(torch.randn_like(parameter))
        if fields.get("norm") == "track":
            model.norm.running_mean.add_(1.5)
    return lora


def output(model):
    x = torch.linspace(-1, 1, 3 * 2 * 4 * 4).reshape(3, 2, 4, 4)
    return model.eval()(x).detach()


def own_tensors(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(first, second):
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def tensor_file(folder):
    (path,) = folder.glob("*.safetensors")
    return path


def manifest_of(folder):
    return json.loads((folder / MANIFEST).read_text())


def write_manifest(folder, manifest):
    """Writes what may be damaged with a checksum that is right for it, which would tell of any damage."""
    (folder / MANIFEST).write_text(json.dumps(sealed(manifest)))


def rewrite(folder, change):
    """Lets `change` edit manifest and tensors, and writes both with a sum that is right again."""
    manifest, path = manifest_of(folder), tensor_file(folder)
    tensors = safetensors.torch.load_file(path)
    change(manifest, tensors)
    data = safetensors.torch.save(tensors)
    path.write_bytes(data)
    manifest["sha256"] = hashlib.sha256(data).hexdigest()
    write_manifest(folder, manifest)
