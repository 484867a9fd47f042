"""Names that modules of transformers had before version 5."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from lora_plugins import LoraConfig, LoraModel, TargetError
from lora_plugins.plan import current_name, former_names

transformers = pytest.importorskip("transformers")


def vit():
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    return transformers.ViTForImageClassification(config).eval()


@pytest.mark.parametrize(
    ("targets", "present"),
    [
        pytest.param(["query", "value"], ["q_proj", "v_proj"], id="PEFT's guide"),
        pytest.param(["attention.output.dense"], ["o_proj"], id="several components"),
        pytest.param(["query", "v_proj"], ["q_proj", "v_proj"], id="former and present"),
        pytest.param(["layer.0.attention.attention.query"], ["vit.layers.0.attention.q_proj"], id="one layer"),
        pytest.param(r".*\.layer\.1\..*\.query", ["vit.layers.1.attention.q_proj"], id="expression"),
    ],
)
def test_former_names_find_the_modules(targets, present):
    with pytest.warns(UserWarning, match="transformers has renamed modules"):
        found = LoraModel.plan(vit(), LoraConfig(target_modules=targets))
    expected = LoraModel.plan(vit(), LoraConfig(target_modules=present))
    assert found.layers == expected.layers
    assert found.config.target_modules == targets  # what the user wrote


def test_the_warning_names_both():
    with pytest.warns(UserWarning, match="'query' is 'q_proj' now; 'value' is 'v_proj' now"):
        LoraModel(vit(), LoraConfig(target_modules=["query", "value"]))


def test_a_model_in_a_model():
    model = nn.ModuleDict({"net": vit(), "other": nn.Linear(4, 4)})
    with pytest.warns(UserWarning, match="renamed"):
        plan = LoraModel.plan(model, LoraConfig(target_modules=["query", "other"]))
    names = [layer.name for layer in plan.layers]
    assert names == ["net.vit.layers.0.attention.q_proj", "net.vit.layers.1.attention.q_proj", "other"]


def test_an_adapter_with_former_names_is_saved_and_loaded(tmp_path):
    first, second = vit(), vit()
    second.load_state_dict(first.state_dict())
    with pytest.warns(UserWarning, match="renamed"):
        lora = LoraModel(first, LoraConfig(target_modules=["query"], init="none"))
    with pytest.warns(UserWarning, match="renamed"):
        LoraModel.load_adapter(second, lora.save_adapter(tmp_path))
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(first(x).logits, second(x).logits)


def test_what_was_never_a_name_is_refused():
    with pytest.raises(TargetError, match="'querry' matches no module"):
        LoraModel.plan(vit(), LoraConfig(target_modules=["querry"]))


def test_what_was_never_a_name_is_not_said_to_be_another_now():
    with (
        pytest.warns(UserWarning, match=r"this model\. 'query' is 'q_proj' now\.$"),
        pytest.raises(TargetError, match="'querry' matches no module"),
    ):
        LoraModel.plan(vit(), LoraConfig(target_modules=["querry", "query"]))


def test_present_names_and_other_models_are_left_alone():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LoraModel.plan(vit(), LoraConfig(target_modules=["q_proj"]))
        with pytest.raises(TargetError):
            LoraModel.plan(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["query"]))


def test_former_names_of_a_part_are_those_of_the_whole():
    former = former_names(vit())
    assert former["vit.layers.0.attention.q_proj"].endswith("attention.query")
    model = nn.ModuleDict({"net": vit(), "nets": nn.Linear(4, 4)})
    assert former_names(model) == {f"net.{name}": f"net.{old}" for name, old in former.items()}


@pytest.mark.parametrize("path", ["", "net"])
def test_present_names_by_former_ones(path):
    model = nn.ModuleDict({"net": vit(), "nets": nn.Linear(4, 4)}) if path else vit()
    current = current_name(model)
    former = former_names(model)
    assert former
    assert {current(old) for old in former.values()} == set(former)
    assert [current(name) for name in former] == list(former)


def test_names_of_other_parts_stay():
    model = nn.ModuleDict({"net": vit(), "nets": nn.Linear(4, 4)})
    old = former_names(vit())["vit.layers.0.attention.q_proj"]
    assert current_name(model)(f"nets.{old}") == f"nets.{old}"
    assert current_name(nn.Linear(4, 4))(old) == old


def test_models_of_others_import_no_models_of_transformers():
    """Libraries import transformers, which imports its models when they are used, and takes a second for it."""
    code = (
        "import sys, torch, transformers\nfrom lora_plugins import LoraConfig, LoraModel, TargetError\n"
        "try:\n    LoraModel(torch.nn.Linear(2, 2), LoraConfig(target_modules=['query']))\n"
        "except TargetError:\n    sys.exit('transformers.modeling_utils' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code], timeout=120, check=False).returncode == 0
