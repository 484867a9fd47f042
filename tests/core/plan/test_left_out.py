"""What `target_modules="all"` leaves out: types without a plugin, and the adapters of other libraries."""

import pytest
import torch
from torch import nn

from lora_plugins import LoraConfig, LoraModel, TargetError, build_registry


class Bank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(3, 4))
        self.scale = nn.Parameter(torch.ones(1, 1, 4))


def plan(model, **fields):
    return LoraModel.plan(model, LoraConfig(**{"r": 2, **fields}))


class TestTypesWithoutAPlugin:
    model = nn.ModuleDict(
        {"up": nn.Linear(4, 4), "one": nn.Bilinear(4, 4, 2), "two": nn.Bilinear(4, 4, 2), "bank": Bank()}
    )

    def test_one_line_for_each_type(self):
        found = plan(self.model)
        assert [str(each) for each in found.left_out] == [
            "not adapted: Bilinear ('one', 'two'): no plugin adapts this type, which has 'weight'",
            "not adapted: Bank ('bank'): no plugin adapts this type, which has 'codes'",
        ]
        assert str(found.left_out[0]) in str(found)

    def test_a_plugin_that_failed_is_named_there(self):
        registry = build_registry([("mine", object())])
        found = LoraModel.plan(self.model, LoraConfig(r=2), registry=registry)
        assert "which has 'weight'. Plugin 'mine' of (given in code) failed: " in str(found.left_out[0])
        adapted = LoraModel.plan(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2), registry=registry)
        assert "mine" not in str(adapted)

    def test_they_are_named_where_nothing_could_be_adapted(self):
        model = nn.Sequential(nn.Bilinear(4, 4, 2), Bank())
        with pytest.raises(TargetError, match=r"adapts\. not adapted: Bilinear \('0'\): no plugin.*Bank \('1'\)"):
            plan(model)

    def test_only_matrices_of_numbers_could_be_adapted(self):
        bank = nn.Module()
        bank.row, bank.column = nn.Parameter(torch.randn(1, 4)), nn.Parameter(torch.randn(4, 1))
        bank.codes = nn.Parameter(torch.ones(3, 4, dtype=torch.int8), requires_grad=False)
        assert plan(nn.ModuleDict({"up": nn.Linear(4, 4), "bank": bank})).left_out == ()
        bank.cube = nn.Parameter(torch.randn(2, 1, 2))
        found = plan(nn.ModuleDict({"up": nn.Linear(4, 4), "bank": bank})).left_out
        assert [str(each) for each in found] == [
            "not adapted: Module ('bank'): no plugin adapts this type, which has 'cube'"
        ]

    def test_complex_matrices_are_listed(self):
        bank = Bank()
        bank.codes = nn.Parameter(torch.randn(3, 4, dtype=torch.complex64))
        found = plan(nn.ModuleDict({"up": nn.Linear(4, 4), "bank": bank})).left_out
        assert [(each.class_name, each.layers) for each in found] == [("Bank", ("bank",))]

    def test_a_class_with_the_name_of_one_of_torch_is_listed_by_its_path(self):
        model = nn.ModuleDict({"up": nn.Linear(4, 4), "lin": type("Linear", (Bank,), {"__module__": "graphs.nn"})()})
        (found,) = plan(model).left_out
        assert found.class_name == "graphs.nn.Linear"
        with pytest.raises(TargetError, match=r"no plugin adapts: 'lin \(graphs\.nn\.Linear\)'"):
            plan(model, target_modules="lin|up")

    @pytest.mark.parametrize(
        "fields",
        [{"target_modules": ["up"]}, {"exclude_modules": ["one", "two", "bank"]}],
        ids=["named", "excluded"],
    )
    def test_what_nobody_asked_for_is_not_listed(self, fields):
        assert plan(self.model, **fields).left_out == ()

    def test_what_is_trained_in_full_is_not_listed(self):
        assert [each.class_name for each in plan(self.model, modules_to_save=["bank"]).left_out] == ["Bilinear"]

    def test_the_model_itself(self):
        class Model(Bank):
            def __init__(self) -> None:
                super().__init__()
                self.up = nn.Linear(4, 4)

        assert plan(Model()).left_out[0].layers == ("the model itself",)


class Reader(nn.Module):
    """Reads the weight of a layer under a name of its own, as the scales of quantized layers do."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight


def test_weights_of_layers_that_others_hold():
    own = Reader(nn.Parameter(torch.ones(2, 2)))
    model = nn.ModuleDict({"up": nn.Linear(4, 4), "bare": nn.Linear(4, 4), "own": own})
    model["list"] = nn.ParameterList([model["bare"].weight])
    model["reader"] = Reader(model["up"].weight)
    others = [str(each) for each in plan(model, exclude_modules=["bare"]).left_out]
    assert others == [
        "not adapted: Reader ('own'): no plugin adapts this type, which has 'weight'",
        "not adapted: ParameterList ('list'): no plugin adapts this type, which has '0'",
        "not adapted: Reader ('reader'): no plugin adapts this type, which has 'weight'. It reads 'up.weight' without "
        "the update, which cannot be merged",
    ]


class TestAdaptersOfOthers:
    def make(self, **fields):
        peft = pytest.importorskip("peft")
        model = nn.ModuleDict({"up": nn.Linear(4, 4), "words": nn.Embedding(5, 4), "head": nn.Linear(4, 2)})
        config = peft.LoraConfig(r=2, target_modules=["up", "words"], **fields)
        return peft.inject_adapter_in_model(config, model)

    @pytest.mark.parametrize("fields", [{}, {"use_dora": True}], ids=["lora", "dora"])
    def test_the_matrices_of_peft_are_no_targets(self, fields):
        found = plan(self.make(**fields))
        assert [layer.name for layer in found.layers] == ["up.base_layer", "words.base_layer", "head"]
        line = next(str(each) for each in found.left_out if each.class_name == "Linear")
        assert line.startswith(
            "not adapted: Linear ('up.lora_A.default', 'up.lora_B.default'): they belong to an adapter"
        )

    @pytest.mark.parametrize("targets", [["up", "head", "2"], r"up|head|other\.2"], ids=["ends", "expression"])
    def test_a_wrapper_among_layers_is_refused(self, targets):
        model = self.make()
        model["other"] = nn.ModuleDict({"up": nn.Linear(4, 4), "2": nn.Linear(4, 4)})
        with pytest.raises(TargetError, match=r"matches 'up', and not the layers in them.*such as 'up\.base_layer'"):
            plan(model, target_modules=targets)

    def test_a_wrapper_that_is_matched_with_its_layer(self):
        found = plan(self.make(), target_modules=r"up|up\.base_layer|head")
        assert [layer.name for layer in found.layers] == ["up.base_layer", "head"]

    def test_a_head_that_peft_trains(self):
        peft = pytest.importorskip("peft")
        model = nn.ModuleDict({"up": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
        model.forward = lambda x: model["head"](model["up"](x))
        config = peft.LoraConfig(r=2, target_modules=["up"], modules_to_save=["head"])
        found = plan(peft.PeftModel(model, config))
        assert [layer.name for layer in found.layers] == ["base_model.model.up.base_layer"]

    @pytest.mark.parametrize(
        "kind", ["IA3Config", "LoHaConfig", "OFTConfig", "VeraConfig", "AdaLoraConfig", "RandLoraConfig"]
    )
    def test_other_adapters_of_peft(self, kind):
        peft = pytest.importorskip("peft")
        model = nn.ModuleDict({"up": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
        extra = {
            "IA3Config": {"feedforward_modules": []},
            "OFTConfig": {"oft_block_size": 2},
            "AdaLoraConfig": {"total_step": 10},
        }
        config = getattr(peft, kind)(target_modules=["up"], **extra.get(kind, {}))
        found = plan(peft.get_peft_model(model, config))
        assert [layer.name.split("model.")[-1] for layer in found.layers] == ["up.base_layer", "head"]

    def test_matrices_that_are_called_so(self):
        class LoRALinear(nn.Linear):  # as torchtune has it
            def __init__(self) -> None:
                super().__init__(4, 4)
                self.lora_a, self.lora_b = nn.Linear(4, 2), nn.Linear(2, 4)

        found = plan(nn.ModuleDict({"up": LoRALinear(), "lora_model": nn.Linear(4, 4)}))
        assert [layer.name for layer in found.layers] == ["up", "lora_model"]

    def test_nothing_else_is_left(self):
        model = nn.ModuleDict({"lora_A": nn.Linear(4, 2)})
        with pytest.raises(TargetError, match="nothing is left to adapt"):
            plan(model)
        assert plan(model, target_modules=["lora_A"]).layers

    def test_training_beside_peft(self):
        model = self.make()
        LoraModel(model, LoraConfig(r=2))
        out = model["head"](model["up"](model["words"](torch.tensor([1, 2]))))
        out.sum().backward()
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert trained
        assert all(".lora_A.default." not in name for name in trained)
