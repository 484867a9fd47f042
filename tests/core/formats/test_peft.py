"""Adapters of PEFT, both ways, against PEFT itself: in float64, to 1e-9."""

import json

import pytest
import torch
from safetensors.torch import load_file

from lora_plugins import LoraModel
from tests.core.formats.peft_cases import (
    CASES,
    TOLERANCE,
    cases,
    difference,
    effect,
    read_by_peft,
    with_ours,
    with_peft,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),  # PEFT, of an embedding called `words`
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),  # PEFT, where Linear and Conv1D are mixed
    pytest.mark.filterwarnings("ignore:Could not identify embedding layer"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match"),  # keys of parameters do
]


@cases
def test_what_peft_writes_is_read(case, tmp_path):
    theirs = with_peft(case)
    assert effect(case, theirs) > 1e-3
    theirs.save_pretrained(tmp_path)
    model = case.build()
    lora = LoraModel.load_adapter(model, tmp_path)
    assert difference(case, model, theirs) <= TOLERANCE
    assert lora.active_adapters == ("default",)
    lora.unload()
    assert difference(case, model, case.build()) == 0


@pytest.mark.parametrize("case", [case for case in CASES if case.ours], ids=lambda case: case.id)
def test_what_we_write_is_read_by_peft(case, tmp_path):
    lora = with_ours(case)
    assert effect(case, lora.model) > 1e-3
    lora.save_adapter(tmp_path, format="peft")
    theirs = read_by_peft(case, tmp_path)
    assert difference(case, theirs, lora.model) <= TOLERANCE


@cases
def test_read_written_and_read_again_has_equal_bits(case, tmp_path):
    with_peft(case).save_pretrained(tmp_path / "first")
    first, second = case.build(), case.build()
    LoraModel.load_adapter(first, tmp_path / "first").save_adapter(tmp_path / "second", format="peft")
    LoraModel.load_adapter(second, tmp_path / "second")
    assert first.state_dict().keys() == second.state_dict().keys()
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in first.state_dict().items())
    assert difference(case, read_by_peft(case, tmp_path / "second"), first) <= TOLERANCE


@cases
def test_what_is_read_can_be_saved_as_ours(case, tmp_path):
    with_peft(case).save_pretrained(tmp_path / "theirs")
    first, second = case.build(), case.build()
    LoraModel.load_adapter(first, tmp_path / "theirs").save_adapter(tmp_path / "ours")
    LoraModel.load_adapter(second, tmp_path / "ours")
    assert difference(case, first, second) == 0


@pytest.mark.parametrize("case", [case for case in CASES if case.ours], ids=lambda case: case.id)
@pytest.mark.parametrize("kind", ["lora_A", "lora_B"])
def test_a_planted_missing_key_fails(case, kind, tmp_path, untouched):
    """PEFT itself only warns, and computes without the layer."""
    with_ours(case).save_adapter(tmp_path, format="peft")
    from safetensors.torch import save_file

    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    (first, *_) = sorted(key for key in tensors if kind in key or kind.replace("_", "_embedding_") in key)
    del tensors[first]
    save_file(tensors, file)
    model = case.build()
    from lora_plugins import AdapterFileError

    with untouched(model), pytest.raises(AdapterFileError):
        LoraModel.load_adapter(model, tmp_path)


def test_the_config_is_plain_json_of_a_plain_adapter(tmp_path):
    case = CASES[0]
    with_ours(case).save_adapter(tmp_path, format="peft")
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (fields["peft_type"], fields["r"], fields["lora_alpha"], fields["bias"]) == ("LORA", 2, 3.0, "none")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
