"""Adapters of a quantized base: the file names the storage and a checksum, and the float base is stored again."""

import pytest
import torch
from torch import nn

from lora_plugins import AdapterFileError, LoraConfig, LoraModel
from lora_plugins.inplace import stored_weights
from lora_plugins.plugins import build_registry
from tests.core.file_cases import manifest_of, rewrite


def build(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 3)).to(dtype)


def config(**fields):
    return LoraConfig(
        **{"r": 2, "modules_to_save": ["4"], "quantize": "nf4", "quantize_options": {"min_size": 0}, **fields}
    )


def adapted(registry=None, dtype=torch.float32, **fields):
    model = build(dtype=dtype)
    lora = LoraModel(model, config(**fields), registry=registry)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return lora


def output(model):
    weight = model[4].weight
    x = torch.linspace(-1, 1, 5 * 32, dtype=weight.dtype).reshape(5, 32)
    return model(x).detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"quantize": "int8"},
        {"quantize_options": {"min_size": 0, "block_size": 16, "double_quant": False}},
        {"quantize_modules": ["2"]},
        {"target_modules": ["0"], "quantize_modules": "all"},
        {"init": "loftq", "init_options": {"iterations": 3}},
        {"init": "pissa"},
        {"init": "olora"},
        {"variant": "dora"},
    ],
    ids=["nf4", "int8", "options", "fewer", "more", "loftq", "pissa", "olora", "dora"],
)
def test_the_float_base_is_stored_again_to_the_same_bits(fields, dtype, tmp_path):
    lora = adapted(dtype=dtype, **fields)
    expected = output(lora.model)
    lora.save_adapter(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 40_000
    model = build(dtype=dtype)
    again = LoraModel.load_adapter(model, tmp_path)
    assert torch.equal(output(model), expected)
    for layer, other in zip(model, lora.model, strict=True):
        for name, stored in stored_weights(layer).items():
            for key, tensor in stored.tensors.items():
                assert torch.equal(tensor, stored_weights(other)[name].tensors[key])
    again.save_adapter(tmp_path / "again")
    assert manifest_of(tmp_path / "again")["stored"] == manifest_of(tmp_path)["stored"]


@pytest.mark.parametrize("init", ["kaiming", "loftq"])
def test_trained_in_half_precision_and_loaded_onto_the_wide_base(init, tmp_path):
    lora = adapted(dtype=torch.bfloat16, init=init)
    lora.save_adapter(tmp_path)
    model = build()
    LoraModel.load_adapter(model, tmp_path)
    assert torch.equal(model[0].weight_stored.dense().bfloat16(), lora.model[0].weight_stored.dense())
    adapted(init=init).save_adapter(tmp_path / "wide")
    with pytest.raises(AdapterFileError, match="in their original type"):
        LoraModel.load_adapter(build(dtype=torch.bfloat16), tmp_path / "wide")


@pytest.mark.parametrize("init", ["kaiming", "loftq"])
def test_onto_the_stored_base_that_it_left(init, tmp_path):
    lora = adapted(init=init)
    expected = output(lora.model)
    lora.save_adapter(tmp_path)
    model = lora.unload(dequantize=False)
    codes = model[0].weight_stored.codes
    LoraModel.load_adapter(model, tmp_path)
    assert model[0].weight_stored.codes is codes
    assert torch.equal(output(model), expected)


def test_an_adapter_that_found_the_base_stored(tmp_path):
    lora = adapted()
    lora.add_adapter("later", LoraConfig(r=3, target_modules=["2"], init="none"))
    lora.set_adapter("later")
    expected = output(lora.model)
    lora.save_adapter(tmp_path)
    model = build()
    LoraModel.load_adapter(model, tmp_path)
    assert torch.equal(output(model), expected)
    assert {name for layer in model for name in stored_weights(layer)} == {"weight"}


def refused(model, path, message, untouched):
    with untouched(model), pytest.raises(AdapterFileError, match=message):
        LoraModel.load_adapter(model, path)


def test_other_bases_are_refused(tmp_path, untouched):
    adapted().save_adapter(tmp_path)
    refused(build(seed=1), tmp_path, r"another base: '0.weight', '2.weight', stored as nf4 with", untouched)
    slightly = build()
    slightly[0].weight.data[3, 3] += 1
    refused(slightly, tmp_path, r"another base: '0.weight', stored as nf4", untouched)
    refused(adapted(quantize="int8").unload(dequantize=False), tmp_path, "here it is stored as int8", untouched)
    broken = build()
    broken[2].weight.data[0, 0] = float("inf")
    refused(broken, tmp_path, "cannot be stored as it was: '2.weight' has values that are not finite", untouched)


def test_a_float_adapter_on_a_stored_base_is_refused(tmp_path, untouched):
    lora = adapted(quantize=None, quantize_options={})
    lora.save_adapter(tmp_path)
    refused(adapted().unload(dequantize=False), tmp_path, "trained on float values of '0.weight'", untouched)


def test_onto_a_model_with_a_float_adapter_is_refused(tmp_path, untouched):
    adapted().save_adapter(tmp_path)
    model = adapted(quantize=None, quantize_options={}).model
    with untouched(model), pytest.raises(AdapterFileError, match="another adapter acts on its float value"):
        LoraModel.load_adapter(model, tmp_path, "other")


DAMAGE = {
    "sum": (lambda m: m["stored"]["0.weight"].update(sum="0"), "another base: '0.weight'"),
    "layer": (lambda m: m["stored"].update({"9.weight": m["stored"]["0.weight"]}), "no such float parameter"),
    "storage": (lambda m: m["stored"]["0.weight"].update(storage="nf9"), "stored as 'nf9' of lora-plugins"),
    "option": (lambda m: m["stored"]["0.weight"]["options"].update(block_size=7), "block_size of nf4 is an even count"),
    "entry": (lambda m: m.update(stored=3), "no proper entry 'stored'"),
    "dtype": (lambda m: m["stored"]["0.weight"].update(dtype="save"), "no proper entry 'stored'"),
    "gone": (lambda m: m.pop("stored"), "no weight that is stored so"),
    "fewer": (lambda m: m["stored"].pop("0.weight"), r"differ: .*weights? only in"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_manifest_is_refused(what, tmp_path, untouched):
    adapted().save_adapter(tmp_path)
    change, message = DAMAGE[what]
    rewrite(tmp_path, lambda manifest, _: change(manifest))
    refused(build(), tmp_path, message, untouched)


def test_a_storage_that_is_not_here_is_named(with_plugins, tmp_path, untouched):
    with_plugins("plugin_storage")
    registry = build_registry()
    adapted(registry, quantize="fp8").save_adapter(tmp_path)
    LoraModel.load_adapter(build(), tmp_path, registry=registry)
    model = build()
    with untouched(model), pytest.raises(AdapterFileError, match=r"stored as 'fp8' of lora-plugins-fp8 0.2.0"):
        LoraModel.load_adapter(model, tmp_path, registry=build_registry(allow=()))


def test_swapping(tmp_path, untouched):
    lora = adapted()
    lora.save_adapter(tmp_path / "one")
    expected = output(lora.model)
    other = LoraModel(build(), config())
    other.swap_adapter("default", tmp_path / "one")
    assert torch.equal(output(other.model), expected)
    fewer = adapted(target_modules=["0"])
    with untouched(fewer.model), pytest.raises(AdapterFileError, match=r"trained on '2.weight' stored in fewer bytes"):
        fewer.swap_adapter("default", tmp_path / "one")


def test_formats_of_others(tmp_path):
    lora = adapted(modules_to_save=[], target_modules=["0", "2"])
    with pytest.warns(UserWarning, match="trained on 2 weights stored as 'nf4', which this format cannot record"):
        lora.save_adapter(tmp_path / "peft", format="peft")
    model = build()
    LoraModel(model, config(modules_to_save=[], target_modules=["0", "2"])).unload(dequantize=False)
    LoraModel.load_adapter(model, tmp_path / "peft")
    assert torch.equal(output(model), output(lora.model))
    pissa = adapted(init="pissa", modules_to_save=[], target_modules=["0"])
    with pytest.raises(AdapterFileError, match=r"'0': the init 'pissa' on a base that is stored in fewer bytes"):
        pissa.save_adapter(tmp_path / "pissa", format="peft")
