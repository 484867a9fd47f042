"""Files of others that can be read, with content of another type, shape or meaning: refused, and nothing is changed."""

import json
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import nn

from lora_plugins import AdapterFileError, LoraConfig, LoraModel
from tests.core.conftest import fingerprint_of

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
FIELDS = (
    "peft_type",
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "lora_dropout",
    "bias",
    "use_rslora",
    "modules_to_save",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_dora",
    "target_parameters",
    "peft_version",
    "lora_bias",
    "new_in_the_next_version",
)
VALUES = (None, True, -1, 1.5, 1e308, 10**30, "x", "", "(", [], {}, [1], ["(a"], [None], [[]], {"a": "x"}, {"(": 1})
"""What may stand in a field where something else is expected."""

MUTATIONS = {
    "whole numbers": lambda tensor: tensor.long(),
    "truth values": lambda tensor: tensor.bool(),
    "eight bits": lambda tensor: tensor.to(torch.float8_e4m3fn),
    "none": lambda _: torch.empty(0),
    "one": lambda _: torch.tensor(1.0),
    "a vector of one": lambda _: torch.ones(1),
    "flat": torch.flatten,
    "one dimension more": lambda tensor: tensor[None],
    "half of it": lambda tensor: tensor.flatten()[: tensor.numel() // 2],
    "twice": lambda tensor: torch.cat([tensor.flatten(), tensor.flatten()]),
}
if Version(version("safetensors")) >= Version("0.7"):  # which can write them
    MUTATIONS["complex"] = lambda tensor: tensor.to(torch.complex64)
OPTIONS = {"peft": {}, "diffusers": {"component": "unet"}, "kohya": {"component": "unet"}}


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()


def saved(folder, format, **config):
    """A trained adapter in a format; returns the path to load and the file of its tensors."""
    model = build()
    lora = LoraModel(model, LoraConfig(r=2, target_modules=["0"], **config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    path = folder if format == "peft" else folder / "adapter.safetensors"
    lora.save_adapter(path, format=format, format_options=OPTIONS[format])
    return path, folder / (TENSORS if format == "peft" else path.name)


def is_loaded(path, format):
    """Whether a file gives a model that computes; a refusal leaves the model as it was, and is no other error."""
    model = build()
    before = fingerprint_of(model)
    try:
        LoraModel.load_adapter(model, path, format=format, format_options=OPTIONS[format])
    except AdapterFileError:
        assert fingerprint_of(model) == before
        return False
    model(torch.ones(2, 4))
    return True


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_another_type_is_refused_or_means_something(field, tmp_path):
    path, _ = saved(tmp_path, "peft")
    content = json.loads((tmp_path / CONFIG).read_text())
    for value in VALUES:
        (tmp_path / CONFIG).write_text(json.dumps({**content, field: value}))
        is_loaded(path, "peft")


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("r", "8", "r is a rank, a whole number from 1"),
        ("lora_alpha", "16", "lora_alpha is a positive, finite number, not '16'"),
        ("lora_alpha", "", "lora_alpha is a positive, finite number, not ''"),
        ("lora_alpha", None, "lora_alpha is a positive, finite number, not None"),
        ("r", None, "r is a rank, a whole number from 1 to 65536, not None"),
        ("lora_dropout", 2, "lora_dropout is a probability"),
        ("bias", "some", "bias is 'some'"),
        ("use_rslora", "false", "use_rslora is True or False, not 'false'"),
        ("rank_pattern", {"(": 2}, r"'\(', which is no regular expression"),
        ("target_modules", True, "target_modules is a list of names"),
        ("layers_to_transform", ["0"], "holds '0', which is not the number of a block"),
    ],
)
def test_a_field_of_another_type_is_named(field, value, said, tmp_path):
    path, _ = saved(tmp_path, "peft")
    content = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**content, field: value}))
    with pytest.raises(AdapterFileError, match=rf"adapter_config\.json is damaged: .*{said}"):
        LoraModel.load_adapter(build(), path)


@pytest.mark.parametrize("format", OPTIONS)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_tensor_of_another_shape_or_type_is_refused_or_fits(format, mutation, tmp_path):
    path, file = saved(tmp_path, format, variant="dora")
    tensors = load_file(file)
    for key, tensor in tensors.items():
        save_file({**tensors, key: MUTATIONS[mutation](tensor).contiguous()}, file, {"format": "pt"})
        loaded = is_loaded(path, format)
        factor = key.endswith(".weight")
        assert not (loaded and factor) or mutation == "eight bits", key


@pytest.mark.parametrize("alpha", [torch.tensor(4), torch.tensor([4]), torch.tensor(4.0, dtype=torch.bfloat16)])
def test_an_alpha_of_a_script_may_be_a_whole_number(alpha, tmp_path):
    path, file = saved(tmp_path, "kohya", alpha=4)
    tensors = load_file(file)
    wanted = LoraModel.load_adapter(build(), path, format_options=OPTIONS["kohya"]).plans["default"].layers[0].settings
    save_file({**tensors, "lora_unet_0.alpha": alpha}, file)
    found = LoraModel.load_adapter(build(), path, format_options=OPTIONS["kohya"]).plans["default"].layers[0].settings
    assert found == wanted


@pytest.mark.parametrize("format", ["peft", "diffusers"])
def test_dora_without_its_magnitude_is_refused(format, tmp_path):
    """It was loaded as plain LoRA, which computes something else."""
    path, file = saved(tmp_path, format, variant="dora")
    kept = {key: tensor for key, tensor in load_file(file).items() if "magnitude" not in key}
    metadata = {} if format == "peft" else {"lora_adapter_metadata": json.dumps({"unet.use_dora": True, "unet.r": 2})}
    save_file(kept, file, metadata)
    with pytest.raises(AdapterFileError, match=r"'0' has no magnitude .* use_dora = True"):
        LoraModel.load_adapter(build(), path, format_options=OPTIONS[format])


def test_a_magnitude_that_the_config_does_not_know_is_refused(tmp_path):
    path, _ = saved(tmp_path, "peft", variant="dora")
    content = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**content, "use_dora": False}))
    with pytest.raises(AdapterFileError, match=r"'0' has a magnitude .* use_dora = False"):
        LoraModel.load_adapter(build(), path)


def test_a_trained_bias_that_is_missing_is_refused(tmp_path):
    """The base's own was taken for it."""
    path, file = saved(tmp_path, "peft", bias="lora_only")
    tensors = load_file(file)
    del tensors["base_model.model.0.base_layer.bias"]
    save_file(tensors, file)
    model = build()
    before = fingerprint_of(model)
    with pytest.raises(AdapterFileError, match=r"bias = 'lora_only'\) and has no values of '0\.bias'"):
        LoraModel.load_adapter(model, path)
    assert fingerprint_of(model) == before
