"""Every call on a stored base does what it does on the float model with the dense values, in any order."""

import copy
import pickle
import random

import pytest
import torch
from torch import nn

from lora_plugins import AdapterFileError, LoraConfig, LoraError, LoraModel, TargetError
from lora_plugins.inplace import all_stored, make_dense


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 8, padding_idx=0)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.fused = nn.Linear(8, 12)
        self.mha = nn.MultiheadAttention(12, 2, batch_first=True)
        self.head = nn.Linear(12, 9, bias=False)

    def forward(self, index):
        x = self.fused(torch.tanh(self.conv(self.embed(index).mT)).mT)
        return self.head(x + self.mha(x, x, x, need_weights=False)[0])


LAYERS = ["embed", "conv", "fused", "mha", "mha.out_proj"]
MIXES = ["embed", "conv", "fused"]
INDEX = torch.tensor([[0, 3, 5], [8, 8, 1]])


def pair(storage, **fields):
    """A model with a stored base, and the same one with the dense values in their place."""
    torch.manual_seed(0)
    stored = Net().double()
    options = {"quantize": storage, "quantize_options": {"min_size": 0}, "quantize_modules": LAYERS}
    LoraModel(stored, LoraConfig(**fields, **options), "first")
    return stored, dense_twin(stored)


def dense_twin(model):
    twin = copy.deepcopy(model)
    layers = [(layer, name) for layer, name, _ in all_stored(twin)]
    make_dense(twin)
    for layer, name in layers:
        layer._parameters[name].requires_grad_(False)
    return twin


def moved(model, seed):
    """Moves what is trained, as a step would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)
    return model


def trained(model):
    model.train()
    model.zero_grad()
    model(INDEX).square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.eval()
    return gradients


def _mixed(lora, names):
    lora.model.eval()
    with lora.mixed_batch(names):
        return {"mixed": lora.model(INDEX).detach()}


def _disabled(lora):
    with lora.disable_adapter():
        return {"disabled": lora.model(INDEX).detach()}


def _config(seed, **fields):
    return LoraConfig(r=1 + seed % 3, target_modules=MIXES if seed % 2 else LAYERS[1:], init="gaussian", **fields)


CALLS = {
    "add": lambda lora, seed: moved(lora.model, seed) and lora.add_adapter(f"a{seed % 4}", _config(seed)),
    "add_head": lambda lora, seed: lora.add_adapter(f"a{seed % 4}", _config(seed, modules_to_save=["head"])),
    "add_dora": lambda lora, seed: lora.add_adapter(
        "dora", LoraConfig(r=2, target_modules=["fused", "mha"], variant="dora")
    ),
    "set": lambda lora, seed: lora.set_adapter([*lora.adapters][seed % len(lora.adapters)]),
    "set_all": lambda lora, seed: lora.set_adapter([*lora.adapters], weights=[0.5] * len(lora.adapters)),
    "delete": lambda lora, seed: lora.delete_adapter([*lora.adapters][-1]) if len(lora.adapters) > 1 else None,
    "merge": lambda lora, seed: lora.merge_adapter() and None,
    "unmerge": lambda lora, seed: lora.unmerge_adapter(),
    "mixed": lambda lora, seed: _mixed(lora, [[*lora.adapters][seed % len(lora.adapters)], None]),
    "disabled": lambda lora, seed: _disabled(lora),
    "train": lambda lora, seed: trained(lora.model),
    "move": lambda lora, seed: moved(lora.model, seed) and None,
    "combine": lambda lora, seed: lora.add_weighted_adapter([*lora.adapters][:2], [0.3, 0.6], f"c{seed % 3}") and None,
    "reload": lambda lora, seed: lora.model.load_state_dict(lora.model.state_dict()) and None,
}


def told(call, lora, seed):
    """What a call returns, or the class of the error that refuses it."""
    try:
        return call(lora, seed) or {}
    except (LoraError, NotImplementedError) as error:
        return type(error)


def assert_same(got, wanted, where):
    if isinstance(wanted, type):
        assert got is wanted, where
        return
    assert got.keys() == wanted.keys(), where
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-9, msg=f"{where}: {name}")


@pytest.mark.parametrize("storage", ["nf4", "int8"])
@pytest.mark.parametrize("seed", range(12))
def test_any_order_of_calls(storage, seed):
    stored, dense = pair(storage, r=2, target_modules=LAYERS, init="gaussian")
    pick = random.Random(seed)
    done = []
    for _ in range(14):
        name, number = pick.choice([*CALLS]), pick.randrange(100)
        done.append(name)
        assert_same(*(told(CALLS[name], LoraModel(model), number) for model in (stored, dense)), done)
        if pick.random() < 0.2:
            stored = pick.choice([copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])(stored)
        with torch.no_grad():
            assert_same({"output": stored.eval()(INDEX)}, {"output": dense.eval()(INDEX)}, done)
    LoraModel(dense).merge_and_unload(max_error=10)
    LoraModel(stored).merge_and_unload(max_error=10, dequantize=True)
    assert list(stored.state_dict()) == list(dense.state_dict())
    assert_same(dict(stored.state_dict()), dict(dense.state_dict()), done)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    torch.manual_seed(0)
    stored = Net().to(dtype)
    fields = {"quantize": "nf4", "quantize_options": {"min_size": 0}, "modules_to_save": ["head"]}
    LoraModel(stored, LoraConfig(r=2, init="gaussian", **fields))
    dense = dense_twin(stored)
    assert torch.equal(stored(INDEX), dense(INDEX))
    for name, gradient in trained(dense).items():
        torch.testing.assert_close(trained(stored)[name], gradient)


def test_autocast():
    stored, dense = pair("nf4", r=2, target_modules=LAYERS, init="gaussian")
    stored, dense = stored.float(), dense.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(stored(INDEX), dense(INDEX))
        stored(INDEX).float().sum().backward()


def two(*, tied=False):
    """Two layers of one size, in eval mode; with one weight, if asked for."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}).eval()
    if tied:
        model["b"].weight = model["a"].weight
    return model


NF4 = {"r": 2, "quantize": "nf4", "quantize_options": {"min_size": 0}}


def test_what_is_stored_has_the_mode_of_its_layer():
    model = two()
    LoraModel(model, LoraConfig(target_modules=["a"], **NF4)).unload(dequantize=False)
    assert not any(module.training for module in model.modules())


def test_a_weight_that_the_first_adapter_froze_is_trainable_again_once_it_is_dense():
    model = two()
    model["a"].weight.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    lora = LoraModel(model, LoraConfig(r=2, target_modules=["a"]), "float")
    lora.add_adapter("nf4", LoraConfig(target_modules=["b"], **NF4))
    lora.unload(dequantize=True)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_a_layer_that_shares_a_stored_weight_is_not_trained_in_full(untouched):
    """Its bias alone would have been trained."""
    model = two(tied=True)
    lora = LoraModel(model, LoraConfig(target_modules=["a", "b"], **NF4))
    with (
        untouched(model),
        pytest.raises(TargetError, match=r"cannot be trained: 'a.weight_stored.codes of torch.uint8"),
    ):
        lora.add_adapter("other", LoraConfig(r=2, target_modules=["a"], modules_to_save=["b"]))


def test_a_weight_that_another_adapter_trains_in_full_is_not_stored(untouched, tmp_path):
    LoraModel(two(), LoraConfig(target_modules=["b"], **NF4)).save_adapter(tmp_path / "nf4")
    model = two()
    lora = LoraModel(model, LoraConfig(r=2, target_modules=["a"], modules_to_save=["b"]))
    message = r"'b.weight' cannot be stored in fewer bytes: the adapter 'default' trains it in full"
    with untouched(model), pytest.raises(TargetError, match=message):
        lora.add_adapter("nf4", LoraConfig(target_modules=["b"], **NF4))
    with untouched(model), pytest.raises(AdapterFileError, match=message):
        LoraModel.load_adapter(model, tmp_path / "nf4", "nf4")
