"""Adapters of modules with any name that a module can have are saved and found."""

import copy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from lora_plugins import LoraConfig, LoraModel
from tests.core.file_cases import (
    QUICK,
    assert_same_state,
    own_tensors,
)

ODD_NAMES = [
    "weight", "bias", "lora", "default", "base_layer", "lora_A", "lora_B", "lora_A_q", "base_model", "model", "value",
    "adapter", "module", "_orig_mod", "0", "a/b", "/", "//", "a/lora_A", "r/lora_A", "q", "recipe", "__metadata__",
    "a b", "ä", "层", "é", "e\u0301", "²", "a+b", "(", "[x]", "*", "^", "\n", "\\", '"', "'", "{}", "%s", "-",
]  # fmt: skip

module_names = st.one_of(
    st.sampled_from(ODD_NAMES),
    st.text(st.characters(exclude_characters=".", exclude_categories=["Cs"]), min_size=1, max_size=6),
).filter(lambda name: not hasattr(nn.Module(), name))


def named_model(paths):
    """A model with a linear layer at each of these paths, of components joined by nothing but nesting."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        root = nn.Module()
        for path in sorted(paths, key=len, reverse=True):  # a container stays one where a shorter path ends at it
            holder = root
            for name in path[:-1]:
                if name not in holder._modules:
                    holder.add_module(name, nn.Module())
                holder = holder._modules[name]
            if path[-1] not in holder._modules:
                holder.add_module(path[-1], nn.Linear(3, 3))
        return root


class TestModuleNames:
    @settings(QUICK)
    @given(st.lists(st.lists(module_names, min_size=1, max_size=3), min_size=1, max_size=6), module_names)
    @example([["a"], ["a/lora_A"], ["a", "q"], ["a/", "q"]], "q")
    @example([["weight"], ["lora", "default", "base_layer"], ["lora_A", "lora_B"]], "lora")
    def test_any_name_that_a_module_can_have_comes_back(self, tmp_path_factory, paths, head):
        folder = tmp_path_factory.mktemp("names")
        paths = [*paths, ["the head", head]]
        model, fresh = named_model(paths), named_model(paths)
        fields = {"modules_to_save": [f"the head.{head}"], "bias": "lora_only"}
        # A pattern, since "all" passes over names by which other libraries call their adapters.
        config = LoraConfig(r=1, init="none", target_modules="(?s).*", **fields)
        lora = LoraModel(model, config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_()
        lora.save_adapter(folder)
        LoraModel.load_adapter(fresh, folder)
        assert_same_state(own_tensors(model), own_tensors(fresh))
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                assert torch.equal(module.weight, fresh.get_submodule(name).weight)
        lora.unload()
        assert_same_state(own_tensors(model), own_tensors(named_model(paths)))

    @pytest.mark.parametrize("name", [name for name in ODD_NAMES if not hasattr(nn.Module(), name)], ids=repr)
    def test_an_odd_name_is_matched_by_a_list(self, name):
        model = named_model([["first", name], ["second"]])
        plan = LoraModel.plan(model, LoraConfig(target_modules=[name], r=1))
        assert [layer.name for layer in plan.layers] == [f"first.{name}"]


class DottedTensors(nn.Module):
    """A module whose tensors have names with dots, as those of `TensorDictParams` of tensordict have."""

    def __init__(self):
        super().__init__()
        self._parameters["scale.of.outputs"] = nn.Parameter(torch.full((2,), 3.0))
        self._parameters["shift"] = nn.Parameter(torch.ones(2))
        self._buffers["offset.of"] = torch.full((2,), 5.0)

    def forward(self, x):
        return x * self._parameters["scale.of.outputs"] + self._parameters["shift"] + self._buffers["offset.of"]


@pytest.mark.parametrize("heads", [[], ["1"]], ids=["frozen", "trained"])
def test_a_module_whose_tensors_have_names_with_dots(tmp_path, heads):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), DottedTensors())
    base, x = copy.deepcopy(model), torch.randn(4, 3)
    lora = LoraModel(model, LoraConfig(r=1, target_modules=["0"], modules_to_save=heads))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x).sum().backward()
    optimizer.step()
    trained = model(x)
    assert not torch.equal(trained, base(x))
    moved = {name for name, tensor in base.state_dict().items() if not torch.equal(tensor, model.state_dict()[name])}
    assert moved == ({"1.scale.of.outputs", "1.shift"} if heads else set())
    lora.save_adapter(tmp_path / "adapter")
    other = copy.deepcopy(base)
    LoraModel.load_adapter(other, tmp_path / "adapter")
    assert torch.equal(other(x), trained)
    with lora.disable_adapter():
        assert torch.equal(model(x), base(x))
    assert_same_state(lora.unload().state_dict(), base.state_dict())
