"""What is called in inference mode leaves a model that can be trained."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from lora_plugins import LoraConfig, LoraModel, StateError
from lora_plugins.files import PackedAdapter


def build(**fields):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 2))
    config = LoraConfig(**{"r": 2, "target_modules": ["0"], "modules_to_save": ["3"], "bias": "lora_only", **fields})
    return model, config


def adapted():
    model, config = build()
    lora = LoraModel(model, config)
    lora.add_adapter("other", config)
    return lora


def learns(model):
    model.train()
    model(torch.randn(5, 4)).sum().backward()
    return all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("init", ["kaiming", "pissa", "loftq"])
def test_adding_and_loading(init, tmp_path):
    model, config = build(init=init)
    with torch.inference_mode():
        lora = LoraModel(model, config)
    lora.save_adapter(tmp_path)
    assert learns(model)
    other, _ = build()
    with torch.inference_mode():
        LoraModel.load_adapter(other, tmp_path)
    assert learns(other)


def test_tensors_that_were_made_there():
    packed = adapted().pack("default")
    with torch.inference_mode():
        packed = PackedAdapter(packed.manifest, {key: tensor.clone() for key, tensor in packed.tensors.items()})
    model, _ = build()
    LoraModel.load_packed(model, packed)
    assert learns(model)


CALLS = {
    "set": lambda lora: (lora.set_adapter("other"), lora.set_adapter("default")),
    "delete": lambda lora: lora.delete_adapter("other"),
    "merge": lambda lora: (lora.merge_adapter(), lora.unmerge_adapter()),
    "combine": lambda lora: (
        lora.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both"),
        lora.set_adapter("both"),
        lora.set_adapter("default"),
    ),
    "unload": lambda lora: lora.unload(),
    "merge for good": lambda lora: lora.merge_and_unload(),
}


@pytest.mark.parametrize("call", CALLS)
def test_changing(call):
    lora = adapted()
    with torch.inference_mode():
        CALLS[call](lora)
    assert not any(tensor.is_inference() for tensor in lora.model.state_dict().values())
    assert learns(lora.model)


def test_disabling():
    lora = adapted()
    with torch.inference_mode(), lora.disable_adapter() as model:
        model.eval()(torch.randn(2, 4))
    assert learns(lora.model)


def test_a_block_of_a_model_that_was_cast():
    lora = adapted()
    lora.model.double()
    with torch.inference_mode(), lora.disable_adapter():
        lora.model.eval()(torch.randn(3, 4, dtype=torch.float64))
    for name in ("other", "default"):
        lora.set_adapter(name)
        assert not any(tensor.is_inference() for tensor in lora.model.parameters())
    lora.model.train()(torch.randn(5, 4, dtype=torch.float64)).sum().backward()
    assert all(p.grad is not None for p in lora.model.parameters() if p.requires_grad)


REFUSED = ["merge_adapter", "merge_and_unload", "unload", "set_adapter"]


@pytest.mark.parametrize("call", REFUSED)
def test_a_model_that_was_copied_in_inference_mode_is_left_as_it_is(call):
    lora = adapted()
    with torch.inference_mode():
        model = copy.deepcopy(lora.model)
        expected = model.eval()(torch.ones(5, 4))
        state = copy.deepcopy(model.state_dict())
    arguments = ("other",) if call == "set_adapter" else ()
    with pytest.raises(StateError, match=r"'0.weight'.* were made in inference mode.*outside of torch\.inference_mode"):
        getattr(LoraModel(model), call)(*arguments)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with torch.inference_mode():
        assert torch.equal(model(torch.ones(5, 4)), expected)


def test_a_model_that_was_built_in_inference_mode_is_refused(tmp_path):
    adapted().save_adapter(tmp_path)
    with torch.inference_mode():
        model, config = build()
    names = [name for name, _ in model.named_modules()]
    for adapt in (lambda: LoraModel(model, config), lambda: LoraModel.load_adapter(model, tmp_path)):
        with pytest.raises(StateError, match="were made in inference mode"):
            adapt()
    assert [name for name, _ in model.named_modules()] == names


class Masked(nn.Module):
    """Keeps a mask for the next batch of the same size, as attention and detection do; two modules share it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.register_buffer("mask", None, persistent=False)
        inner.register_buffer("mask", None, persistent=False)

    def forward(self, x):
        if self.mask is None:
            self.mask = self.inner.mask = torch.arange(x.shape[1]) < 3
        return self.inner(x * self.mask)


@pytest.mark.parametrize("call", CALLS)
def test_buffers_that_a_forward_has_left(call):
    model, config = build()
    model = Masked(model)
    config = dataclasses.replace(config, target_modules=["inner.0"], modules_to_save=["inner.3"])
    x = torch.randn(5, 4)
    with torch.inference_mode():
        expected = model.eval()(x)
    lora = LoraModel(model, config)
    lora.add_adapter("other", config)
    assert torch.equal(model.eval()(x), expected)
    with torch.inference_mode():
        model.mask = model.inner.mask = model.mask.clone()
    CALLS[call](lora)
    assert model.mask is model.inner.mask
    assert not model.mask.is_inference()
    assert learns(model)
    assert torch.equal(model.mask, torch.tensor([True, True, True, False]))


def test_such_buffers_in_a_block():
    model, config = build()
    model = Masked(model).eval()
    lora = LoraModel(model, dataclasses.replace(config, target_modules=["inner.0"], modules_to_save=["inner.3"]))
    with torch.inference_mode():
        model(torch.randn(5, 4))
        with lora.disable_adapter():
            model(torch.randn(5, 4))
    assert learns(model)
