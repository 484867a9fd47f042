"""An adapter whose plugins are not here names who brought them; one that contradicts itself is refused."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from lora_plugins import (
    INITS,
    LAYERS,
    STORAGES,
    VARIANTS,
    AdapterFileError,
    LoraConfig,
    LoraModel,
    RowMajorPlugin,
    Slot,
    StoragePlugin,
)
from lora_plugins.files import MANIFEST
from lora_plugins.inits.gaussian import GaussianInit
from lora_plugins.variants.dora import DoraVariant
from tests.core.file_cases import adapt, build, manifest_of, rewrite, write_manifest
from tests.core.registries import registry_of


class OtherInit(GaussianInit):
    name = "other_init"


class OtherVariant(DoraVariant):
    name = "other_variant"


class OtherLayer(RowMajorPlugin):
    name = "other_layer"
    module_type = nn.Bilinear


def model() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"plain": nn.Linear(4, 3), "pairs": nn.Bilinear(2, 3, 4)})


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"target_modules": ["plain"], "init": "other_init"}, "init 'other_init'"),
        ({"target_modules": ["plain"], "variant": "other_variant"}, "variant 'other_variant'"),
        ({"target_modules": ["pairs"]}, "layer type 'other_layer'"),
    ],
    ids=["init", "variant", "layer type"],
)
def test_the_distribution_of_a_plugin_that_is_not_here_is_named(fields, what, tmp_path):
    registry = registry_of(OtherLayer(), OtherInit(), OtherVariant())
    LoraModel(model(), LoraConfig(r=2, **fields), registry=registry).save_adapter(tmp_path)
    with pytest.raises(AdapterFileError, match=rf"{what} of \(given in code\), which is not here.*registry=build_reg"):
        LoraModel.load_adapter(model(), tmp_path)
    text = (tmp_path / MANIFEST).read_text().replace("(given in code)", "their-package")
    write_manifest(tmp_path, json.loads(text.replace('"version": "-"', '"version": "1.2"')))
    with pytest.raises(AdapterFileError, match=rf"made with the {what} of their-package 1\.2, which is not here"):
        LoraModel.load_adapter(model(), tmp_path)
    LoraModel.load_adapter(model(), tmp_path, registry=registry)
    write_manifest(tmp_path, json.loads(text.replace('"their-package"', "null")))
    with pytest.raises(AdapterFileError, match=rf"made with the {what} of an unknown distribution, which is not here"):
        LoraModel.load_adapter(model(), tmp_path)


class Halves(OtherInit):
    """An init that changes the base otherwise in each version."""

    changes_base = True
    by = 0.5

    def changed_base(self, weight, recipe, scaling, options):
        return weight * self.by


class Thirds(Halves):
    by = 1 / 3


class Parted(OtherLayer):
    def slots(self, layer):
        return [Slot("weight", "w")]


class Gated(OtherVariant):
    def shapes(self, rows, columns, r):
        return {**super().shapes(rows, columns, r), "gate": (1,)}


class Rounded(StoragePlugin):
    name = "rounded"
    by = 16

    def store(self, weight, options):
        return {"codes": (weight * self.by).round().to(torch.int8)}

    def restore(self, tensors, shape, options):
        return tensors["codes"].float().view(shape) / self.by


class Finer(Rounded):
    by = 32


def registry_with(kind, plugin, version):
    """A registry with one plugin, as if it came from a distribution of a version."""
    registry = registry_of(plugin)
    owned = registry.of(kind)[plugin.name]
    named = replace(owned, info=replace(owned.info, distribution="their-package", version=version))
    objects = {**registry.of(kind), plugin.name: named}
    return replace(registry, by_kind={**registry.by_kind, kind.name: objects})


@pytest.mark.parametrize(
    ("kind", "old", "new", "fields"),
    [
        (INITS, Halves(), Thirds(), {"target_modules": ["plain"], "init": "other_init"}),
        (VARIANTS, OtherVariant(), Gated(), {"target_modules": ["plain"], "variant": "other_variant"}),
        (LAYERS, OtherLayer(), Parted(), {"target_modules": ["pairs"]}),
        (
            STORAGES,
            Rounded(),
            Finer(),
            {"target_modules": ["plain"], "quantize": "rounded", "quantize_options": {"min_size": 1}},
        ),
    ],
    ids=["init", "variant", "layer type", "storage"],
)
def test_a_refused_adapter_tells_that_its_plugin_has_another_version(kind, old, new, fields, tmp_path, untouched):
    LoraModel(model(), LoraConfig(r=2, **fields), registry=registry_with(kind, old, "1.2")).save_adapter(tmp_path)
    LoraModel.load_adapter(model(), tmp_path, registry=registry_with(kind, old, "1.3"))
    fresh = model()
    told = rf"made with the {kind.title} '{old.name}' of their-package 1\.2, and here is that of their-package 2\.0"
    with untouched(fresh), pytest.raises(AdapterFileError, match=told):
        LoraModel.load_adapter(fresh, tmp_path, registry=registry_with(kind, new, "2.0"))
    with untouched(fresh), pytest.raises(AdapterFileError) as refused:
        LoraModel.load_adapter(fresh, tmp_path, registry=registry_with(kind, new, "1.2"))
    assert "here is" not in str(refused.value)


@pytest.mark.parametrize(("key", "other"), [("init", "kaiming"), ("variant", "dora")])
def test_a_config_that_is_not_the_one_of_the_manifest_is_refused(key, other, tmp_path):
    adapt(build(), init="gaussian").save_adapter(tmp_path)
    manifest = manifest_of(tmp_path)
    manifest["config"][key] = other
    write_manifest(tmp_path, manifest)
    with pytest.raises(AdapterFileError, match=rf"made with the {key} '.*', and its config {other!r}"):
        LoraModel.load_adapter(build(), tmp_path)


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_an_adapter_of_a_changed_base_does_not_load_on_an_unchanged_one(init, tmp_path):
    """Whoever edits both places is told by the sums of the changed weights, or by the tensors."""
    adapt(build(), init="loftq", init_options={"iterations": 5, "bits": 2}).save_adapter(tmp_path)

    def change(manifest, tensors):
        manifest["config"] |= {"init": init, "init_options": {}}
        manifest["init"]["name"] = init
        recipe = [key for key in tensors if key.startswith("recipe/")]
        assert recipe
        for key in recipe:
            del tensors[key], manifest["tensors"][key]

    rewrite(tmp_path, change)
    with pytest.raises(AdapterFileError):
        LoraModel.load_adapter(build(), tmp_path)
