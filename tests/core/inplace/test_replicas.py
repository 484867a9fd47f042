"""`nn.DataParallel`, which the Trainer of transformers takes where it finds several GPUs."""

import importlib
import threading

import pytest
import torch
from torch import nn

from lora_plugins import LoraConfig, LoraModel

torch_replicate = importlib.import_module("torch.nn.parallel.replicate")


@pytest.fixture
def replicate(monkeypatch):
    """That of torch on a CPU: what it does not have there is the copy of tensors to other GPUs, by NCCL."""

    def copies(tensors, devices, detach=False):
        return [[(tensor.detach() if detach else tensor).clone() for tensor in tensors] for _ in devices]

    monkeypatch.setattr(torch_replicate, "_broadcast_coalesced_reshape", copies)
    return lambda network, detach=False: torch_replicate.replicate(network, [0, 1], detach)


class Network(nn.Module):
    """Layers of every kind that keeps its weights in another way."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.recurrent = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.up(torch.relu(self.conv(x))).flatten(2).transpose(1, 2)
        x = self.attention(x, x, x, need_weights=False)[0]
        x, _ = self.recurrent(self.normed(x))
        return self.head(x.mean(1))


def adapted(**options):
    network = Network().double()
    with torch.no_grad():
        lora = LoraModel(network, LoraConfig(r=2, **options))
        for name, parameter in network.named_parameters():
            if ".lora_B" in name:
                parameter.normal_()
    return network, lora


def in_threads(replicas, inputs):
    outputs, recording = [None] * len(replicas), torch.is_grad_enabled()

    def run(at):
        with torch.set_grad_enabled(recording):
            outputs[at] = replicas[at](inputs[at])

    threads = [threading.Thread(target=run, args=(at,)) for at in range(len(replicas))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return torch.cat(outputs)


def gradients(network, output):
    network.zero_grad()
    output.pow(2).sum().backward()
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


KINDS = {
    "all layers": {},
    "little memory": {"memory": "low"},
    "biases": {"bias": "all"},
    "a head": {"target_modules": ["conv", "recurrent"], "modules_to_save": ["head"]},
    "dora": {"target_modules": ["conv", "normed", "head"], "variant": "dora"},
    "another base": {"target_modules": ["conv", "attention", "head"], "init": "pissa"},
    "a stored base": {
        "target_modules": ["conv", "attention", "head"],
        "quantize": "int8",
        "quantize_options": {"min_size": 16},
    },
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_replicas_compute_and_train_as_the_model(options, replicate):
    network, _ = adapted(**{"target_modules": "all", **options})
    x = torch.randn(4, 3, 4, 4, dtype=torch.float64)
    whole = network(x)
    expected = gradients(network, whole)
    parts = in_threads(replicate(network), x.chunk(2))
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(network, parts), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_replicas_of_a_merged_model(options, replicate):
    network, lora = adapted(**{"target_modules": "all", **options})
    x = torch.randn(4, 3, 4, 4, dtype=torch.float64)
    lora.merge_adapter()
    with torch.no_grad():
        parts = in_threads(replicate(network, detach=True), x.chunk(2))
        torch.testing.assert_close(parts, network(x), rtol=1e-12, atol=1e-12)
