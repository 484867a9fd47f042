"""Injection: all or nothing, from a seed that nothing else disturbs, and quick."""

import copy
import time

import pytest
import torch
from torch import nn

from lora_plugins import InitPlugin, LoraConfig, LoraModel
from tests.core.registries import registry_of


def build():
    torch.manual_seed(5)
    return nn.ModuleDict(
        {
            "conv": nn.Conv2d(3, 4, 3),
            "norm": nn.BatchNorm2d(4),
            "blocks": nn.ModuleList(nn.Linear(4, 4) for _ in range(3)),
            "head": nn.Linear(4, 2),
        }
    )


def factors(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class FailingInit(InitPlugin):
    """Fails at the last of the layers, when the others are done."""

    name = "failing"

    def fill(self, context):
        if context.layer == "head":
            raise MemoryError("out of luck")
        nn.init.ones_(context.A)
        nn.init.ones_(context.B)
        return {}


class FailingBase(FailingInit):
    """Fails when the changed base of the last layer is computed."""

    name = "failing_base"
    changes_base = True

    def fill(self, context):
        nn.init.ones_(context.A)
        nn.init.ones_(context.B)
        return {}

    def changed_base(self, weight, recipe, scaling, options):
        if weight.shape == (2, 4):
            raise MemoryError("out of luck")
        return weight + 1


class TestAllOrNothing:
    @pytest.mark.parametrize("init", ["failing", "failing_base"])
    @pytest.mark.parametrize("adapted", [False, True], ids=["first adapter", "second adapter"])
    def test_an_init_that_fails_leaves_the_model_as_it_was(self, untouched, init, adapted):
        model, registry = build(), registry_of(FailingInit(), FailingBase())
        if adapted:
            LoraModel(model, LoraConfig(r=2, init="none", modules_to_save=["norm"]), "first")
        with untouched(model), pytest.raises(MemoryError):
            LoraModel(model, LoraConfig(r=2, init=init, bias="all"), "second", registry=registry)

    def test_one_layer_that_cannot_be_served_leaves_all_as_they_were(self, untouched):
        model = build()
        model["head"].lora_A = nn.Parameter(torch.zeros(1))
        with untouched(model), pytest.raises(ValueError, match="'head'"):
            LoraModel(model, LoraConfig(r=2))

    @pytest.mark.parametrize("name", ["", "a.b", "a b", "a/b", "-a", "..", "ä.b"])
    def test_a_name_that_no_adapter_can_have_is_refused(self, untouched, name):
        model = build()
        with untouched(model), pytest.raises(ValueError, match="cannot name an adapter"):
            LoraModel(model, LoraConfig(r=2), name)

    def test_a_name_that_is_taken_is_refused(self, untouched):
        model = build()
        lora = LoraModel(model, LoraConfig(r=2), "one")
        message = r"has an adapter 'one' already.* LoraModel\(model\)\.delete_adapter\('one'\), or choose another"
        with untouched(model), pytest.raises(ValueError, match=message):
            lora.add_adapter("one", LoraConfig(r=2))

    @pytest.mark.parametrize("name", ["weight", "bias", "half", "lora_A", "default", "T", "0", "größe", "a-1"])
    def test_every_other_name_works(self, name, tmp_path):
        model, fresh = build(), build()
        lora = LoraModel(model, LoraConfig(r=2, init="none", modules_to_save=["norm"]), name)
        lora.save_adapter(tmp_path)
        LoraModel.load_adapter(fresh, tmp_path)
        assert same(factors(model), factors(fresh))
        assert factors(model).keys() >= {f"head.lora_A.{name}", f"head.lora_B.{name}"}
        assert type(lora.unload()["head"]) is nn.Linear


class TestSeeds:
    @pytest.mark.parametrize("init", ["kaiming", "gaussian", "none"])
    def test_the_same_seed_gives_the_same_factors_whatever_ran_before(self, init):
        found = []
        for draws in (0, 1, 1000):
            model = build()
            torch.manual_seed(11)
            torch.randn(draws)
            LoraModel(model, LoraConfig(r=2, init=init))
            found.append(factors(model))
        assert same(found[0], found[1])
        assert same(found[0], found[2])

    def test_another_seed_gives_other_factors(self):
        found = []
        for seed in (1, 2):
            model = build()
            torch.manual_seed(seed)
            LoraModel(model, LoraConfig(r=2))
            found.append(factors(model)["head.lora_A.default"])
        assert not torch.equal(*found)

    def test_layers_of_one_shape_differ(self):
        model = build()
        LoraModel(model, LoraConfig(r=2))
        assert not torch.equal(*[model["blocks"][i].lora_A["default"] for i in (0, 1)])

    def test_a_layer_s_factors_do_not_depend_on_the_other_layers(self):
        both = []
        for targets in ("all", ["blocks.1"]):
            model = build()
            torch.manual_seed(3)
            LoraModel(model, LoraConfig(r=2, target_modules=targets))
            both.append(model["blocks"][1].lora_A["default"])
        assert torch.equal(*both)

    @pytest.mark.parametrize("init", ["kaiming", "gaussian", "none", "loftq"])
    def test_the_random_state_of_the_user_is_not_moved(self, init):
        model = build()
        before = torch.get_rng_state()
        lora = LoraModel(model, LoraConfig(r=2, init=init))
        lora.unload()
        assert torch.equal(torch.get_rng_state(), before)


def test_models_with_one_packed_adapter_are_trained_apart():
    """As where several runs begin with the adapter that was packed before them."""
    first, second = build(), build()
    packed = LoraModel(build(), LoraConfig(r=2, init="gaussian", bias="all")).pack("default")
    for model in (first, second):
        LoraModel.load_packed(model, packed)
    before = copy.deepcopy(second.state_dict())
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(1)
    assert [key for key, value in second.state_dict().items() if not torch.equal(value, before[key])] == []


def test_a_layer_that_only_a_deleted_adapter_had_is_what_it_was():
    layer = nn.Linear(4, 4)
    model, before = nn.Sequential(layer, nn.Linear(4, 4)), set(vars(layer))
    lora = LoraModel(model, LoraConfig(r=2, target_modules=["0"]), "a")
    lora.add_adapter("b", LoraConfig(r=2, target_modules=["1"]))
    lora.delete_adapter("a")
    assert type(layer) is nn.Linear
    assert set(vars(layer)) == before


class TestSpeed:
    """Times are printed, not asserted: they belong to the machine, and to what else runs on it."""

    def test_a_thousand_layers(self):
        model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(1000)])
        start = time.perf_counter()
        lora = LoraModel(model, LoraConfig(r=4))
        middle = time.perf_counter()
        lora.unload()
        end = time.perf_counter()
        print(f"1000 layers: injected in {middle - start:.2f} s, unloaded in {end - middle:.2f} s")

    def test_vit_base(self):
        timm = pytest.importorskip("timm")
        model = timm.create_model("vit_base_patch16_224", pretrained=False)
        start = time.perf_counter()
        lora = LoraModel(model, LoraConfig(r=16, target_modules=["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]))
        print(
            f"timm ViT-B, {len(lora.plans['default'].layers)} layers: injected in {time.perf_counter() - start:.2f} s"
        )
        assert len(lora.plans["default"].layers) == 48
