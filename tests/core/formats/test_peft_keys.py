"""Keys of files of PEFT that are missing, doubled or named in another way: PEFT warns, and computes without them."""

import copy
from collections import OrderedDict
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import nn

from lora_plugins import AdapterFileError, LoraConfig, LoraModel
from tests.core.formats.peft_cases import (
    ATTENTION,
    BY_ID,
    LINEAR,
    TOLERANCE,
    Case,
    Repeated,
    Twice,
    edit_config,
    edit_tensors,
    moved,
    read_by_peft,
    read_exactly,
    refused,
    with_peft,
)


class SharedHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens, self.stem = nn.Embedding(6, 4), nn.Linear(4, 4)
        self.tokens_out = nn.Linear(4, 6, bias=False)
        self.tokens_out.weight = self.embed_tokens.weight

    def forward(self, tokens):
        return self.tokens_out(self.stem(self.embed_tokens(tokens)))


class TiedHead(SharedHead):
    """One that says so, in the words of transformers."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"tokens_out.weight": "embed_tokens.weight"}

    def get_input_embeddings(self):
        return self.embed_tokens


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.heads = nn.ModuleList([nn.Linear(4, 2), nn.ModuleDict({"b": nn.Linear(4, 2)})])

    def forward(self, x):
        x = self.stem(x)
        return self.heads[0](x) + self.heads[1]["b"](x)


def check_is_exact(case, folder, edit):
    """Checks that a file of PEFT whose keys were edited loads as what PEFT computes."""
    theirs = with_peft(case)
    theirs.save_pretrained(folder)
    edit_tensors(folder, edit)
    read_exactly(case, folder, theirs)


class TestKeys:
    """PEFT warns of missing keys, and computes without them: an adapter can do nothing."""

    def test_a_missing_layer_is_listed(self, tmp_path, untouched):
        with_peft(LINEAR).save_pretrained(tmp_path)
        edit_tensors(tmp_path, lambda tensors: [tensors.pop(key) for key in list(tensors) if ".inner.fc." in key])
        refused(LINEAR, tmp_path, untouched, r"1 layer of this model that it has no A and B for: 'inner\.fc'")

    def test_an_adapter_on_top_of_another_is_told(self, tmp_path, untouched):
        peft, theirs = pytest.importorskip("peft"), with_peft(LINEAR)
        with pytest.warns(UserWarning, match="for a second time|Already found a `peft_config`"):
            peft.get_peft_model(theirs, peft.LoraConfig(target_modules=["fc"])).save_pretrained(tmp_path)
        refused(LINEAR, tmp_path, untouched, r"'base_model\.model\.' once more: get_peft_model was called on a model")

    @pytest.mark.parametrize("targets", [["inner.fc"], r"inner\.fc"], ids=["names", "an expression"])
    def test_a_layer_that_is_no_target_is_listed(self, targets, tmp_path, untouched):
        """PEFT leaves it out, and its rank and alpha could be those of another adapter."""
        with_peft(LINEAR).save_pretrained(tmp_path)
        edit_config(tmp_path, target_modules=targets)
        refused(LINEAR, tmp_path, untouched, r"A and B for \d layers? that its config does not target: 'fc'")

    @pytest.mark.parametrize(
        ("gone", "match"),
        [
            pytest.param("head.", r"trained 'head' in full \(modules_to_save\) and has no values", id="a head"),
            pytest.param("head.weight", r"lacks 'head\.weight'", id="a tensor of a head"),
            pytest.param("running_mean", r"lacks 'block\.bn\.running_mean'", id="a statistic"),
        ],
    )
    def test_missing_values_are_listed(self, gone, match, tmp_path, untouched):
        case = replace(
            BY_ID["heads with statistics"], peft={"target_modules": ["line"], "modules_to_save": ["bn", "head"]}
        )
        with_peft(case).save_pretrained(tmp_path)
        edit_tensors(tmp_path, lambda tensors: [tensors.pop(key) for key in list(tensors) if gone in key])
        refused(case, tmp_path, untouched, match)

    def test_half_a_layer_is_listed(self, tmp_path, untouched):
        with_peft(LINEAR).save_pretrained(tmp_path)
        edit_tensors(tmp_path, lambda tensors: tensors.pop("base_model.model.inner.fc.lora_B.weight"))
        refused(LINEAR, tmp_path, untouched, r"The layer 'inner\.fc' of the adapter has only A: A or B is missing")

    @pytest.mark.parametrize("pattern", [None, "up", ["up", "in"]], ids=["any container", "one", "a list of them"])
    def test_a_missing_layer_of_a_block_is_listed(self, pattern, tmp_path, untouched):
        case = BY_ID["blocks by number"]
        with_peft(case, layers_pattern=pattern).save_pretrained(tmp_path)
        edit_tensors(tmp_path, lambda tensors: [tensors.pop(key) for key in list(tensors) if "up.1" in key])
        refused(case, tmp_path, untouched, r"1 layer of this model that it has no A and B for: 'net\.up\.1\.fc'")

    @pytest.mark.parametrize(
        ("key", "match"),
        [
            pytest.param("fc.lora_A.weight", "does not start with 'base_model.model.'", id="no prefix"),
            pytest.param("base_model.model.fc.lora_C.weight", "no key of PEFT's LoRA", id="no factor"),
            pytest.param("base_model.model.other.weight", "'other.weight'", id="no tensor of the model"),
            pytest.param("base_model.model.fc.lora_B.bias", r"bias_B \(2,\)", id="a bias of B"),
            pytest.param(
                "base_model.model._orig_mod.inner.fc.lora_A.weight",
                "another key has another value",
                id="a second value",
            ),
            pytest.param(
                "base_model.model.emb.token_adapter.trainable_tokens_delta", "trained tokens", id="trained tokens"
            ),
        ],
    )
    def test_a_key_that_is_left_over_is_listed(self, key, match, tmp_path, untouched):
        with_peft(LINEAR).save_pretrained(tmp_path)
        edit_tensors(tmp_path, lambda tensors: tensors.update({key: torch.zeros(2)}))
        refused(LINEAR, tmp_path, untouched, match)

    @pytest.mark.parametrize(
        ("saved", "targets", "match"),
        [
            pytest.param("stem", ["lora_stem"], "letters of 'stem', and so 'lora_stem'", id="an adapted layer"),
            pytest.param("head", ["lora_stem"], "and so 'head.sub_head'", id="a module inside"),
            pytest.param("layer", ["stem"], "and so 'stem'", id="the base_layer of PEFT's wrapper"),
            pytest.param("out", ["stem"], "and so 'stem'", id="the lora_dropout of PEFT's wrapper"),
            pytest.param("B", ["stem"], "and so 'stem'", id="the lora_B of PEFT's wrapper"),
            pytest.param("fault", ["stem"], "and so 'stem'", id="the name of an adapter"),
        ],
    )
    def test_what_peft_takes_for_a_head_as_well_is_refused_when_written(self, saved, targets, match, tmp_path):
        """PEFT compares the ends of names by letters: it fails when it reads what it wrote of such a model."""
        model = nn.ModuleDict(
            {
                "stem": nn.Linear(2, 2),
                "lora_stem": nn.Linear(2, 2),
                "layer": nn.Linear(2, 2),
                "out": nn.Linear(2, 2),
                "B": nn.Linear(2, 2),
                "fault": nn.Linear(2, 2),
                "head": nn.Sequential(OrderedDict(sub_head=nn.Linear(2, 2))),
            }
        )
        lora = LoraModel(model, LoraConfig(target_modules=targets, modules_to_save=[saved]))
        with pytest.raises(AdapterFileError, match=match):
            lora.save_adapter(tmp_path / "new", format="peft")
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize("saved", ["tokens_out", "embed_tokens"])
    def test_a_head_that_shares_its_weight_is_written_under_each_name(self, saved, tmp_path):
        """PEFT gives each module that it trains a copy of its own."""
        case = Case("", SharedHead, {"target_modules": ["stem"]})
        model = case.build()
        LoraModel(model, LoraConfig(r=2, init="none", target_modules=["stem"], modules_to_save=[saved]))
        with torch.no_grad():
            model.tokens_out.weight.mul_(1.5)
        LoraModel(model).save_adapter(tmp_path, format="peft")
        again = case.build()
        LoraModel.load_adapter(again, tmp_path)
        tokens = torch.tensor([[1, 2]])
        for other in (again, read_by_peft(case, tmp_path)):
            torch.testing.assert_close(other(tokens), model(tokens), rtol=0, atol=TOLERANCE)

    @pytest.mark.parametrize(
        ("net", "saved", "left"),
        [
            pytest.param(SharedHead, "embed_tokens", "tokens_out.weight'", id="a shared weight"),
            pytest.param(SharedHead, "tokens_out", "embed_tokens.weight'", id="the other one"),
            pytest.param(
                lambda: nn.ModuleDict({"stem": nn.Linear(4, 4), "twice": Twice()}),
                "again",
                "twice.first.",
                id="a layer",
            ),
        ],
    )
    def test_the_copy_of_a_head_that_is_shared_here_is_refused(self, net, saved, left, tmp_path, untouched):
        """PEFT trains a copy, and leaves what shares the tensor as it was."""
        case = Case("", net, {"target_modules": ["stem"], "modules_to_save": [saved]})
        with_peft(case).save_pretrained(tmp_path)
        refused(case, tmp_path, untouched, rf"PEFT trained a copy of '(twice\.)?{saved}\..* and left '{left}")

    @pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`, but no tied modules")
    @pytest.mark.parametrize("saved", ["embed_tokens", "tokens_out"])
    def test_nor_does_it_train_both_where_it_finds_no_tie(self, saved, tmp_path, untouched):
        fields = {"modules_to_save": [saved], "ensure_weight_tying": True}
        case = Case("", SharedHead, {"target_modules": ["stem"], **fields})
        with_peft(case).save_pretrained(tmp_path)
        refused(case, tmp_path, untouched, rf"PEFT trained a copy of '{saved}\.weight' and left")

    def test_a_shared_weight_that_it_trained_for_both_is_read(self, tmp_path):
        fields = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
        case = Case("", TiedHead, {"target_modules": ["stem"], **fields})
        theirs = with_peft(case)
        theirs.save_pretrained(tmp_path)
        model, tokens = case.build(), torch.tensor([[1, 2]])
        LoraModel.load_adapter(model, tmp_path)
        torch.testing.assert_close(model(tokens), theirs(tokens), rtol=0, atol=TOLERANCE)

    def test_a_bias_that_is_shared_is_no_copy(self, tmp_path):
        """PEFT trains it in its place, for both layers, and writes it under the name of the adapted one."""

        def tied():
            model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            model[1].bias = model[0].bias
            return model

        case = Case("", tied, {"target_modules": ["0"], "bias": "lora_only"})
        theirs = with_peft(case)
        theirs.save_pretrained(tmp_path)
        model, x = case.build(), torch.ones(2, 4, dtype=torch.float64)
        LoraModel.load_adapter(model, tmp_path)
        torch.testing.assert_close(model(x), theirs(x), rtol=0, atol=TOLERANCE)

    def test_values_that_differ_for_two_names_of_one_tensor_are_told_by_both(self, tmp_path, untouched):
        case = Case("", SharedHead, {"target_modules": ["stem"], "modules_to_save": ["embed_tokens", "tokens_out"]})
        with_peft(case).save_pretrained(tmp_path)
        edit_tensors(tmp_path, lambda tensors: tensors["base_model.model.tokens_out.weight"].add_(1))
        refused(case, tmp_path, untouched, "'tokens_out.weight' and 'embed_tokens.weight' are one and the same")

    @pytest.mark.filterwarnings("ignore:.*PEFT can compute something else")
    def test_magnitudes_that_differ_for_two_names_of_one_layer_are_told_by_both(self, tmp_path):
        shared = nn.Linear(4, 4)
        model = nn.ModuleDict({"a": shared, "b": shared})
        apart = nn.ModuleDict({name: copy.deepcopy(shared) for name in model})
        LoraModel(apart, LoraConfig(r=2, variant="dora")).save_adapter(tmp_path, format="peft")

        def alike_but_for_magnitudes(tensors):
            for key in [key for key in tensors if ".b." in key]:
                tensors[key] = tensors[key.replace(".b.", ".a.")] + ("magnitude" in key)

        edit_tensors(tmp_path, alike_but_for_magnitudes)
        with pytest.raises(AdapterFileError, match="'b' and 'a' are one and the same"):
            LoraModel.load_adapter(model, tmp_path)

    @pytest.mark.filterwarnings("ignore:.*PEFT can compute something else before merging")
    def test_alphas_that_differ_for_two_names_of_one_layer_are_told_by_both(self, tmp_path):
        shared = nn.Linear(4, 4)
        model = nn.ModuleDict({"a": shared, "b": shared})
        apart = nn.ModuleDict({name: copy.deepcopy(shared) for name in model})
        LoraModel(apart, LoraConfig(r=2, alpha_pattern={"b": 3.0})).save_adapter(tmp_path, format="peft")
        edit_tensors(tmp_path, lambda tensors: tensors.update({key: torch.ones_like(tensors[key]) for key in tensors}))
        with pytest.raises(AdapterFileError, match="'b' and 'a' are one and the same"):
            LoraModel.load_adapter(model, tmp_path)

    @pytest.mark.parametrize("init", ["pissa", "olora"])
    @pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
    def test_a_rank_above_that_of_the_matrix_is_read(self, init, rslora, tmp_path):
        """PEFT's decompositions have no more ranks than the matrix, and scale by the rank of the config."""
        peft = pytest.importorskip("peft")
        case = Case("", lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), {})
        options = {"r": 8, "lora_alpha": 4, "init_lora_weights": init, "use_rslora": rslora}
        config = peft.LoraConfig(target_modules=["0", "1"], **options)
        theirs = moved(peft.get_peft_model(case.build().float(), config))
        theirs.save_pretrained(tmp_path)
        model, x = case.build().float(), torch.ones(2, 4)
        LoraModel.load_adapter(model, tmp_path)
        torch.testing.assert_close(model(x), theirs(x), rtol=0, atol=1e-5)

    def test_a_container_that_is_trained_is_written_as_what_is_in_it(self, tmp_path):
        case = Case("", Heads, {"target_modules": ["stem"]})
        model = case.build()
        LoraModel(model, LoraConfig(r=2, init="none", target_modules=["stem"], modules_to_save=["heads"]))
        with torch.no_grad():
            model.heads[1]["b"].weight.mul_(1.5)
        LoraModel(model).save_adapter(tmp_path, format="peft")
        again, x = case.build(), torch.ones(2, 4, dtype=torch.float64)
        LoraModel.load_adapter(again, tmp_path)
        for other in (again, read_by_peft(case, tmp_path)):
            torch.testing.assert_close(other(x), model(x), rtol=0, atol=TOLERANCE)

    def test_statistics_of_a_norm_with_an_activation_are_written_as_the_whole_norm(self, tmp_path):
        """As the norms of timm are: there is nothing in an activation that PEFT would lose."""

        class NormAct(nn.BatchNorm1d):
            def __init__(self):
                super().__init__(4)
                self.act = nn.Tanh()

            def forward(self, x):
                return self.act(super().forward(x))

        case = Case("", lambda: nn.Sequential(nn.Linear(4, 4), NormAct()))
        model, x = case.build(), torch.eye(4, dtype=torch.float64)
        LoraModel(model, LoraConfig(r=2, init="none", target_modules=["0"], norm="track"))
        model[1].running_mean.add_(0.25)
        LoraModel(model).save_adapter(tmp_path, format="peft")
        again = case.build()
        LoraModel.load_adapter(again, tmp_path)
        for other in (again, read_by_peft(case, tmp_path)):
            torch.testing.assert_close(other(x), model(x), rtol=0, atol=TOLERANCE)

    @pytest.mark.parametrize("kind", ["list", "dict"])
    def test_a_container_of_parameters_is_refused_when_written(self, kind, tmp_path):
        own = nn.Parameter(torch.zeros(4))
        model = nn.Module()
        model.stem = nn.Linear(4, 4)
        model.prompts = nn.ParameterList([own]) if kind == "list" else nn.ParameterDict({"0": own})
        lora = LoraModel(model, LoraConfig(target_modules=["stem"], modules_to_save=["prompts"]))
        with pytest.raises(AdapterFileError, match=r"'prompts\.0' was trained by itself"):
            lora.save_adapter(tmp_path / "new", format="peft")
        assert not (tmp_path / "new").exists()

    def test_a_head_inside_a_head_is_refused(self, tmp_path, untouched):
        """PEFT writes its first values over those that it trained, and raises a KeyError when it reads them."""

        class Nested(nn.Module):
            def __init__(self):
                super().__init__()
                self.stem = nn.Linear(6, 6)
                self.head = nn.Sequential(OrderedDict(norm=nn.LayerNorm(6), fc=nn.Linear(6, 3)))

        case = Case("", Nested, {"target_modules": ["stem"], "modules_to_save": ["head", "norm"]})
        with_peft(case).save_pretrained(tmp_path)
        refused(case, tmp_path, untouched, r"names 'head\.norm', and 'head' around it")

    def test_names_of_a_compiled_model_are_understood(self, tmp_path):
        def compiled(tensors):
            for key in list(tensors):
                tensors[key.replace("base_model.model.", "base_model.model._orig_mod.")] = tensors.pop(key)

        check_is_exact(LINEAR, tmp_path, compiled)

    @pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
    @pytest.mark.parametrize("id", ["linear", "dora", "embedding and Conv1D", "attention"])
    def test_keys_with_the_name_of_the_adapter_are_understood(self, id, tmp_path):
        """As a state dict of PEFT's model has them."""

        def named(tensors):
            for key in [key for key in tensors if ".lora_" in key]:
                start, weight, _ = key.partition(".weight")
                tensors[f"{start}.default{weight}"] = tensors.pop(key)

        check_is_exact(BY_ID[id], tmp_path, named)

    def test_keys_with_another_name_are_listed(self, tmp_path, untouched):
        """PEFT reads nothing of them; not even a layer that has no other key may be left out without a word."""
        with_peft(LINEAR).save_pretrained(tmp_path)

        def named(tensors):
            for key in list(tensors):
                tensors[key.replace(".weight", ".night.weight")] = tensors.pop(key)

        edit_tensors(tmp_path, named)
        refused(LINEAR, tmp_path, untouched, r"'fc\.lora_A\.night\.weight': it is no key of PEFT's LoRA")

    def test_magnitudes_with_another_ending_are_understood(self, tmp_path):
        def ending(tensors):
            for key in [key for key in tensors if key.endswith("magnitude_vector")]:
                tensors[f"{key}.weight"] = tensors.pop(key)

        check_is_exact(BY_ID["dora"], tmp_path, ending)

    def test_another_model_is_refused(self, tmp_path, untouched):
        with_peft(LINEAR).save_pretrained(tmp_path)
        refused(ATTENTION, tmp_path, untouched, "are not in this model: 'fc'")

    def test_other_shapes_are_refused(self, tmp_path, untouched):
        class Wide(Repeated):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(7, 6)

        with_peft(LINEAR).save_pretrained(tmp_path)
        refused(
            Case("", Wide), tmp_path, untouched, r"'fc' has A \(2, 6\) and B \(6, 2\), and this model needs \(2, 7\)"
        )
