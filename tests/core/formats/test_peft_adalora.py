"""Files of PEFT's AdaLoRA, against PEFT itself, which reads them with the first rank.

What it has in training may differ: it leaves the number of ranks trainable, and does not save it.
"""

import pytest
from safetensors.torch import load_file

from lora_plugins import LoraModel
from tests.core.formats.peft_cases import (
    BY_ID,
    LINEAR,
    TENSORS,
    edit_tensors,
    effect,
    moved,
    read_by_peft,
    read_exactly,
    refused,
)

CASES = {
    "linear": (LINEAR, ["fc"], {}),
    "convolution": (BY_ID["convolutions"], ["conv1"], {}),
    "Conv1D": (BY_ID["embedding and Conv1D"], ["mixer"], {"fan_in_fan_out": True}),
}
cases = pytest.mark.parametrize(("case", "targets", "fields"), CASES.values(), ids=CASES)


def with_adalora(case, targets, **fields):
    peft = pytest.importorskip("peft")
    config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, lora_alpha=3, target_modules=targets, **fields)
    return moved(peft.get_peft_model(case.build(), config)).eval()


@cases
def test_the_outputs_are_those_of_peft(case, targets, fields, tmp_path):
    theirs = with_adalora(case, targets, use_rslora=True, **fields)  # which it does not use
    assert effect(case, theirs) > 1e-3
    theirs.save_pretrained(tmp_path)
    read_exactly(case, tmp_path, read_by_peft(case, tmp_path))


@pytest.mark.filterwarnings("ignore:.*invalid shape")  # by PEFT, of a layer without a rank
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")  # by PEFT, of what its own files say
@cases
def test_ranks_that_training_took_away(case, targets, fields, tmp_path):
    """The scaling stays that of the first rank; of the first layer nothing is left where there are several."""
    theirs = with_adalora(case, targets, **fields)
    names = [name for name, _ in theirs.base_model.model.named_parameters() if ".lora_E." in name]
    kept = {name: [True, False, True, False] for name in names}
    if len(names) > 1:
        kept[names[0]] = [False] * 4
    theirs.base_model.resize_modules_by_rank_pattern(kept, "default")
    theirs.peft_config["default"].rank_pattern = kept
    theirs.save_pretrained(tmp_path)
    assert {len(tensor) for key, tensor in load_file(tmp_path / TENSORS).items() if key.endswith("lora_E")} <= {0, 2}
    expected = read_by_peft(case, tmp_path)
    assert effect(case, expected) > 1e-4
    read_exactly(case, tmp_path, expected)


def test_it_is_lora_here(tmp_path):
    with_adalora(LINEAR, ["fc"]).save_pretrained(tmp_path)
    lora = LoraModel.load_adapter(LINEAR.build(), tmp_path)
    assert {layer.r for layer in lora.plans["default"].layers} == {4}
    lora.save_adapter(tmp_path / "again", format="peft")
    read_exactly(LINEAR, tmp_path / "again", lora.model)


@pytest.mark.parametrize("factor", "ABE")
def test_a_layer_without_one_of_its_tensors_is_refused(factor, tmp_path, untouched):
    with_adalora(LINEAR, ["fc"]).save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.pop(f"base_model.model.fc.lora_{factor}"))
    refused(LINEAR, tmp_path, untouched, r"'base_model\.model\.fc' lacks lora_A, lora_B or lora_E")


@pytest.mark.parametrize("factor", "ABE")
def test_a_tensor_of_another_shape_is_refused(factor, tmp_path, untouched):
    with_adalora(LINEAR, ["fc"]).save_pretrained(tmp_path)
    key = f"base_model.model.fc.lora_{factor}"
    edit_tensors(tmp_path, lambda tensors: tensors.update({key: tensors[key].flatten()}))
    refused(LINEAR, tmp_path, untouched, rf"fc' has .*lora_{factor} \(\d+,\).*AdaLoRA has \(r, in\)")
