"""An adapter stays what it was where plugins for further layer types have come since."""

import pytest
import torch
from torch import nn

from lora_plugins import AdapterFileError, LoraConfig, LoraModel, RowMajorPlugin
from tests.core.file_cases import manifest_of, write_manifest
from tests.core.registries import registry_of


class Named(nn.Linear):
    """A layer that the built-in plugin of Linear adapts, unless there is a plugin for its own class."""


class PairsPlugin(RowMajorPlugin):
    name = "pairs"
    module_type = nn.Bilinear


class NamedPlugin(RowMajorPlugin):
    name = "named"
    module_type = Named


FURTHER = registry_of(PairsPlugin(), NamedPlugin())


def model() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"plain": nn.Linear(4, 3), "named": Named(4, 3), "pairs": nn.Bilinear(2, 3, 4)})


def saved(folder, targets="all", registry=None):
    """Returns an adapter with values in all its factors, saved in a folder."""
    lora = LoraModel(model(), LoraConfig(r=2, target_modules=targets), registry=registry)
    with torch.no_grad():
        for parameter in lora.model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    lora.save_adapter(folder)
    return lora


def plugins(lora):
    return {layer.name: layer.plugin.name for layer in lora.plans["default"].layers}


@pytest.mark.parametrize("targets", ["all", ["named", "plain"]], ids=["all", "names"])
def test_it_loads_with_the_layer_types_that_it_was_made_with(targets, tmp_path):
    before = saved(tmp_path / "before", targets)
    after = LoraModel.load_adapter(model(), tmp_path / "before", registry=FURTHER)
    assert plugins(after) == plugins(before) == {"plain": "linear", "named": "linear"}
    x = torch.randn(5, 4)
    for name in ("plain", "named"):
        torch.testing.assert_close(after.model[name](x), before.model[name](x), rtol=0, atol=0)


def test_it_is_saved_again_as_it_was(tmp_path):
    saved(tmp_path / "before")
    LoraModel.load_adapter(model(), tmp_path / "before", registry=FURTHER).save_adapter(tmp_path / "again")
    assert manifest_of(tmp_path / "again")["layer_types"] == manifest_of(tmp_path / "before")["layer_types"]
    LoraModel.load_adapter(model(), tmp_path / "again", registry=FURTHER)


@pytest.mark.parametrize("targets", ["all", ["named", "plain"]], ids=["all", "names"])
def test_it_is_written_for_others_as_it_was(targets, tmp_path):
    before = saved(tmp_path / "before", targets)
    LoraModel.load_adapter(model(), tmp_path / "before", registry=FURTHER).save_adapter(
        tmp_path / "peft", format="peft"
    )
    after = LoraModel.load_adapter(model(), tmp_path / "peft")
    x = torch.randn(5, 4)
    for name in ("plain", "named"):
        torch.testing.assert_close(after.model[name](x), before.model[name](x), rtol=0, atol=0)


def test_a_new_adapter_beside_it_has_the_further_layers(tmp_path):
    saved(tmp_path)
    lora = LoraModel.load_adapter(model(), tmp_path, registry=FURTHER)
    lora.add_adapter("new", LoraConfig(r=2, target_modules="all"))
    found = {layer.name: layer.plugin.name for layer in lora.plans["new"].layers}
    assert found == {"plain": "linear", "named": "named", "pairs": "pairs"}


def test_one_that_has_the_further_layers_needs_them(tmp_path, untouched):
    saved(tmp_path, registry=FURTHER)
    LoraModel.load_adapter(model(), tmp_path, registry=FURTHER)
    with untouched(fresh := model()), pytest.raises(AdapterFileError, match="layer type 'pairs'"):
        LoraModel.load_adapter(fresh, tmp_path)


@pytest.mark.parametrize("types", ["linear", [1], {"linear": 1}], ids=["word", "numbers", "map"])
def test_a_damaged_list_of_them_is_refused(types, tmp_path):
    saved(tmp_path)
    write_manifest(tmp_path, {**manifest_of(tmp_path), "layer_types": types})
    with pytest.raises(AdapterFileError, match="no proper entry 'layer_types'"):
        LoraModel.load_adapter(model(), tmp_path)
