"""Settings, folders and hostile content of files of PEFT, against PEFT itself where it has an answer."""

import json
import re
import struct
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_plugins import AdapterFileError, ConfigError, LoraConfig, LoraModel, StateError
from lora_plugins.cli.main import main
from lora_plugins.files import foreign_patterns
from tests.core.formats.peft_cases import (
    ATTENTION,
    BY_ID,
    CONFIG,
    LINEAR,
    SINGLE,
    TENSORS,
    TOLERANCE,
    Case,
    Staged,
    difference,
    edit_config,
    edit_tensors,
    moved,
    read_by_peft,
    read_exactly,
    refused,
    with_ours,
    with_peft,
)
from tests.slow import slow_but


class Headed(nn.Module):
    """A head with the name and the methods by which PEFT finds those of language models."""

    def __init__(self):
        super().__init__()
        self.embed_tokens, self.lm_head = nn.Embedding(7, 6), nn.Linear(6, 7)

    def get_input_embeddings(self):
        return self.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, tokens):
        return self.lm_head(self.embed_tokens(tokens))


class TestAttention:
    """PEFT up to 0.21.2 applies the update of `out_proj` twice, before merging and after."""

    def test_the_product_counts_twice(self, tmp_path):
        with_peft(ATTENTION).save_pretrained(tmp_path)
        B = load_file(tmp_path / TENSORS)["base_model.model.mha.base_layer.out_proj.lora_B.weight"]
        model = ATTENTION.build()
        LoraModel.load_adapter(model, tmp_path)
        assert torch.equal(model.mha.out_proj.lora_B["default"], 2 * B)

    def test_merged_too(self, tmp_path):
        theirs = with_peft(ATTENTION)
        theirs.save_pretrained(tmp_path)
        model = ATTENTION.build()
        LoraModel.load_adapter(model, tmp_path).merge_adapter()
        assert difference(ATTENTION, model, theirs.merge_and_unload()) <= TOLERANCE

    @pytest.mark.parametrize("version", ["0.99.0", "main"], ids=["later", "none"])
    def test_an_unknown_version_has_to_be_explained(self, version, tmp_path, untouched):
        with_peft(ATTENTION).save_pretrained(tmp_path)
        edit_config(tmp_path, peft_version=version)
        said = rf"written by PEFT {re.escape(version)}\. .*format_options=\{{'out_proj': 'once'\}}"
        refused(ATTENTION, tmp_path, untouched, said)
        outputs = {}
        for times in ("once", "twice"):
            model = ATTENTION.build()
            LoraModel.load_adapter(model, tmp_path, format_options={"out_proj": times})
            outputs[times] = model.mha.out_proj.lora_B["default"]
        assert torch.equal(outputs["twice"], 2 * outputs["once"])

    @pytest.mark.parametrize("version", [None, "0.15.0", "0.20.1.dev0@0a1b2c3", "0.21.2"])
    def test_older_versions_are_known(self, tmp_path, version):
        theirs = with_peft(ATTENTION)
        theirs.save_pretrained(tmp_path)
        edit_config(tmp_path, peft_version=version)
        read_exactly(ATTENTION, tmp_path, theirs)

    def test_two_readings_are_told_of_a_file_that_is_inspected(self, tmp_path, capsys):
        with_peft(ATTENTION).save_pretrained(tmp_path)
        edit_config(tmp_path, peft_version="0.99.0")
        assert main(["inspect", str(tmp_path)]) == 0
        told = capsys.readouterr().out
        assert "to be said: The adapter has attention layers and was written by PEFT 0.99.0." in told
        assert "\nmha.out_proj " in told

    def test_out_proj_alone_has_two_meanings(self, tmp_path, untouched):
        case = Case("out_proj alone", ATTENTION.model, {"target_modules": ["out_proj"]})
        theirs = with_peft(case)
        theirs.save_pretrained(tmp_path)
        assert difference(case, theirs, case.build()) == 0  # the trap: it is ignored
        refused(case, tmp_path, untouched, r"'mha\.out_proj' has two meanings.*format_options=\{'out_proj': 'once'\}")
        model = case.build()
        LoraModel.load_adapter(model, tmp_path, format_options={"out_proj": "once"})
        assert difference(case, model, theirs.merge_and_unload()) <= TOLERANCE

    def test_out_proj_alone_has_one_meaning_as_peft_trains_it(self, tmp_path):
        """What is ignored gets no gradient, so that B stays zero."""
        case = Case("out_proj alone", ATTENTION.model, {"target_modules": ["out_proj", "last"]})
        theirs = with_peft(case)
        theirs.base_model.model.mha.out_proj.lora_B["default"].weight.data.zero_()
        theirs.save_pretrained(tmp_path)
        model = case.build()
        LoraModel.load_adapter(model, tmp_path)
        assert difference(case, model, theirs) <= TOLERANCE
        assert difference(case, model, theirs.merge_and_unload()) <= TOLERANCE


@pytest.mark.parametrize(
    ("case", "option", "said"),
    [
        (ATTENTION, {"out_proj": "two"}, r"out_proj is 'two'\. Did you mean"),
        (LINEAR, {"patterns": "last"}, r"patterns is 'last'\. Did you mean 'longest'"),
    ],
    ids=["out_proj", "patterns"],
)
def test_an_unknown_reading_is_refused(case, option, said, tmp_path):
    with_peft(case).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=said):
        LoraModel.load_adapter(case.build(), tmp_path, format_options=option)


def test_a_rank_and_an_alpha_with_their_counts_are_read(tmp_path):
    """As PEFT's script for files of kohya writes them, beside patterns that name every layer."""
    theirs = with_peft(LINEAR)
    theirs.save_pretrained(tmp_path)
    layers = theirs.base_model.targeted_module_names
    edit_config(
        tmp_path,
        r=[2, 9],
        lora_alpha=[3.0, 9],
        rank_pattern=dict.fromkeys(layers, 2),
        alpha_pattern=dict.fromkeys(layers, 3.0),
    )
    assert difference(LINEAR, read_by_peft(LINEAR, tmp_path), theirs) <= TOLERANCE
    read_exactly(LINEAR, tmp_path, theirs)


class TestStarts:
    """`pissa` and `olora` look like plain adapters, and are adapters of another base."""

    @pytest.mark.parametrize("init", ["pissa", "olora"])
    def test_they_are_computed_again(self, init, tmp_path):
        theirs = with_peft(SINGLE, init_lora_weights=init)
        theirs.save_pretrained(tmp_path)
        model = SINGLE.build()
        lora = LoraModel.load_adapter(model, tmp_path)
        assert difference(SINGLE, model, theirs) <= 1e-6  # float32: outputs around 1 have steps of 1e-7
        lora.unload()
        assert difference(SINGLE, model, SINGLE.build()) == 0

    @pytest.mark.parametrize("init", ["pissa", "olora"])
    def test_read_naively_they_are_far_off(self, init, tmp_path):
        theirs = with_peft(SINGLE, init_lora_weights=init)
        theirs.save_pretrained(tmp_path)
        edit_config(tmp_path, init_lora_weights=True)
        model = SINGLE.build()
        LoraModel.load_adapter(model, tmp_path)
        assert difference(SINGLE, model, theirs) > 1e-2

    @pytest.mark.parametrize("variant", ["lora", "dora"])
    @pytest.mark.parametrize("use_rslora", [False, True])
    @pytest.mark.parametrize("init", ["pissa", "olora"])
    def test_ours_are_written_as_a_difference(self, init, use_rslora, variant, tmp_path):
        lora = with_ours(LINEAR, init=init, use_rslora=use_rslora, variant=variant)
        lora.save_adapter(tmp_path, format="peft")
        assert json.loads((tmp_path / CONFIG).read_text())["r"] == 4  # [A; A0], [B, -B0]
        assert difference(LINEAR, read_by_peft(LINEAR, tmp_path), lora.model) <= TOLERANCE

    @pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
    @pytest.mark.parametrize("init", ["pissa", "olora"])
    def test_the_weight_that_the_start_left_is_no_other_weight(self, init, tmp_path, untouched):
        """PEFT saves the weights of heads beside their adapters, and those of a base that it has changed."""
        case = Case("", Headed, {"target_modules": ["lm_head"]}, dtype=torch.float32)
        theirs = with_peft(case, init_lora_weights=init)
        theirs.save_pretrained(tmp_path)
        key = "base_model.model.lm_head.base_layer.weight"
        assert not torch.equal(load_file(tmp_path / TENSORS)[key], case.build().lm_head.weight)
        model, x = case.build(), torch.arange(7)
        LoraModel.load_adapter(model, tmp_path)
        torch.testing.assert_close(model(x), theirs(x), rtol=0, atol=1e-6)  # float32
        edit_tensors(tmp_path, lambda tensors: tensors.update({key: torch.zeros(9, 6)}))
        refused(case, tmp_path, untouched, "comes with its own 'lm_head.weight'.*resized")

    def test_loftq_cannot_be_written(self, tmp_path):
        lora = with_ours(LINEAR, init="loftq")
        with pytest.raises(AdapterFileError, match=r"'inner\.fc': the init 'loftq', whose base is no low-rank change"):
            lora.save_adapter(tmp_path / "new", format="peft")
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize("init", ["pissa_niter_4", "loftq", "lora_ga", "corda"])
    def test_what_cannot_be_computed_again_is_refused(self, init, tmp_path, untouched):
        with_peft(LINEAR).save_pretrained(tmp_path)
        edit_config(tmp_path, init_lora_weights=init)
        refused(LINEAR, tmp_path, untouched, f"started by '{init}'.*path_initial_model_for_weight_conversion")

    def test_embeddings_that_peft_would_leave_out_are_refused(self, tmp_path, untouched):
        case = replace(BY_ID["embedding and Conv1D"], peft={"target_modules": ["words"]})
        with_peft(case, init_lora_weights="pissa").save_pretrained(tmp_path)
        refused(case, tmp_path, untouched, "started by 'pissa'.*Merge it in PEFT, .*leaves embeddings out")

    def test_a_convolution_that_peft_cannot_have_started_so_is_refused(self, tmp_path, untouched):
        with_peft(BY_ID["convolutions"]).save_pretrained(tmp_path)
        edit_config(tmp_path, init_lora_weights="pissa")
        refused(BY_ID["convolutions"], tmp_path, untouched, "started by 'pissa', which PEFT knows for Linear layers")

    @pytest.mark.parametrize("init", [False, "gaussian", "orthogonal", "mica"])
    def test_the_others_are_plain(self, init, tmp_path):
        case = SINGLE if init == "mica" else LINEAR
        theirs = with_peft(case, init_lora_weights=init)
        theirs.save_pretrained(tmp_path)
        model = case.build()
        LoraModel.load_adapter(model, tmp_path)
        assert difference(case, model, theirs) <= (1e-6 if init == "mica" else TOLERANCE)

    @pytest.mark.parametrize("field", ["velora_config", "monteclora_config"])
    def test_so_is_what_differs_in_training_alone(self, field, tmp_path):
        theirs = with_peft(LINEAR, **{field: {}})
        theirs.save_pretrained(tmp_path)
        assert any(field.removesuffix("_config") in key for key in load_file(tmp_path / TENSORS))
        read_exactly(LINEAR, tmp_path, theirs)


class TestPatterns:
    """The first pattern that matches counts, and PEFT sorts them when it saves."""

    PATTERNS = Case("", LINEAR.model, {"target_modules": ["fc"], "alpha_pattern": {"inner.fc": 5, "fc": 7}})

    def test_a_lost_order_has_to_be_explained(self, tmp_path, untouched):
        theirs = with_peft(self.PATTERNS)
        theirs.save_pretrained(tmp_path)
        refused(self.PATTERNS, tmp_path, untouched, r"alpha_pattern says \[7, 5\] of 'inner\.fc'")
        first, longest = self.PATTERNS.build(), self.PATTERNS.build()
        LoraModel.load_adapter(first, tmp_path, format_options={"patterns": "first"})
        LoraModel.load_adapter(longest, tmp_path, format_options={"patterns": "longest"})
        assert difference(self.PATTERNS, first, read_by_peft(self.PATTERNS, tmp_path)) <= TOLERANCE
        assert difference(self.PATTERNS, longest, theirs) <= TOLERANCE  # as it was trained
        assert difference(self.PATTERNS, longest, first) > 1e-3

    def test_a_lost_order_is_told_of_a_file_that_is_inspected(self, tmp_path, capsys):
        """It shows what PEFT reads; the file itself is sound."""
        with_peft(self.PATTERNS).save_pretrained(tmp_path)
        assert main(["inspect", str(tmp_path)]) == 0
        told = capsys.readouterr().out
        assert "to be said: alpha_pattern says [7, 5] of 'inner.fc'." in told
        (row,) = [line.split() for line in told.splitlines() if line.startswith("inner.fc ")]
        assert row[2] == "7"

    def test_what_we_write_survives_being_saved_by_peft(self, tmp_path):
        case = BY_ID["patterns"]
        lora = with_ours(case)
        lora.save_adapter(tmp_path / "ours", format="peft")
        read_by_peft(case, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
        assert difference(case, read_by_peft(case, tmp_path / "theirs"), lora.model) <= TOLERANCE

    @pytest.mark.parametrize(
        ("fields", "older"),
        [
            ({"rank_pattern": {"fc": 5}, "alpha_pattern": {"more.fc": 9}}, {"rank_pattern": {"fc": 5}}),
            ({"alpha_pattern": {r"inner\.fc": 9}}, {}),
        ],
        ids=["one for rank and alpha", "only behind a part of the name"],
    )
    def test_what_they_meant_before_has_to_be_told_by_the_version(self, fields, older, tmp_path, untouched):
        case = replace(LINEAR, peft={**LINEAR.peft, **older})
        theirs = with_peft(case)  # as an older one trained it
        theirs.save_pretrained(tmp_path)
        edit_config(tmp_path, peft_version=None, **fields)
        refused(LINEAR, tmp_path, untouched, r"depends on the version of PEFT .* \(9 since 0\.15, .*3 since 0\.6\)")
        for version, expected in {"0.13.2": theirs, "0.15.0": read_by_peft(LINEAR, tmp_path)}.items():
            edit_config(tmp_path, peft_version=version)
            model = read_exactly(LINEAR, tmp_path, expected)
        assert difference(LINEAR, model, theirs) > 1e-3

    @pytest.mark.parametrize("version", ["0.14.0", "0.14.1.dev0@0a1b2c3"])
    def test_in_0_14_they_did_not_match_whole_names(self, version, tmp_path):
        theirs = with_peft(LINEAR)
        theirs.save_pretrained(tmp_path)
        edit_config(tmp_path, peft_version=version, alpha_pattern={r"inner\.fc": 9})
        read_exactly(LINEAR, tmp_path, theirs)

    def test_ranks_tell_their_meaning(self, tmp_path):
        theirs = with_peft(LINEAR)
        theirs.save_pretrained(tmp_path)
        said = {r"inner\.fc": 4}  # which older versions looked for behind a part of the name
        edit_config(tmp_path, peft_version=None, rank_pattern=said, alpha_pattern=said)
        read_exactly(LINEAR, tmp_path, theirs)
        model = LINEAR.build()
        LoraModel.load_adapter(model, tmp_path, format_options={"patterns": "first"})
        assert difference(LINEAR, model, theirs) <= TOLERANCE

    @pytest.mark.parametrize(
        "fields",
        [
            {"rank_pattern": {"fc": 5}, "alpha_pattern": {"fc": 9}},
            {"rank_pattern": {"inner.more.fc": 5}, "alpha_pattern": {"inner.fc": 9}},
            {"rank_pattern": {"^inner.fc": 5}, "alpha_pattern": {"^inner.fc": 9}},
        ],
        ids=["the same", "whole names", "told by ranks"],
    )
    def test_without_a_version_most_have_one_meaning(self, fields, tmp_path):
        case = replace(LINEAR, peft={**LINEAR.peft, **fields})
        theirs = with_peft(case)
        theirs.save_pretrained(tmp_path)
        edit_config(tmp_path, peft_version=None)
        read_exactly(case, tmp_path, theirs)

    @pytest.mark.parametrize(
        ("fields", "edited", "rank"),
        [({}, {"r": 4}, 2), ({"r": 4, "rank_pattern": {"more.fc": 3}}, {"rank_pattern": {}}, 3)],
        ids=["some", "all that the matrix has"],
    )
    def test_a_rank_that_the_config_does_not_say(self, fields, edited, rank, tmp_path, untouched):
        with_peft(replace(LINEAR, peft={**LINEAR.peft, **fields})).save_pretrained(tmp_path)
        edit_config(tmp_path, **edited)
        refused(LINEAR, tmp_path, untouched, f"has rank {rank} in the tensors and 4 in the config")


class TestBlocks:
    """Of several numbers in a name, PEFT takes the first for that of a block; before 0.20, it took the last."""

    @pytest.mark.parametrize("version", [None, "0.17.1", "0.19.1"])
    @pytest.mark.parametrize("lists", [None, "", r"stages\.\d+"], ids=["any list", "no name", "the inner list"])
    def test_it_was_the_last_number(self, version, lists, tmp_path, untouched):
        case = Case("", Staged, {"target_modules": r".*\.1\.fc"})
        theirs = with_peft(case)
        theirs.save_pretrained(tmp_path)
        fields = {"target_modules": ["fc"], "layers_to_transform": [1], "layers_pattern": lists}
        edit_config(tmp_path, **fields, peft_version=version)
        read_exactly(case, tmp_path, theirs)
        edit_config(tmp_path, layers_to_transform=[0, 1])
        refused(case, tmp_path, untouched, "2 layers of this model that it has no A and B for: 'net.stages.0.0.fc'")

    def test_it_is_the_first_number(self, tmp_path, untouched):
        case = Case("", Staged, {"target_modules": ["fc"], "layers_to_transform": [1]})
        theirs = with_peft(case)
        theirs.save_pretrained(tmp_path)
        read_exactly(case, tmp_path, theirs)
        edit_config(tmp_path, peft_version="0.19.1")
        refused(case, tmp_path, untouched, "1 layer of this model that it has no A and B for: 'net.stages.0.1.fc'")


class TestSeveral:
    """A file is read onto a model that has adapters already, whose own values are not the base's."""

    def test_a_second_adapter(self, tmp_path):
        case = BY_ID["heads with statistics"]
        theirs = with_peft(case)
        theirs.save_pretrained(tmp_path)
        model = with_ours(case).model
        lora = LoraModel.load_adapter(model, tmp_path, "second")
        lora.set_adapter("second")
        assert difference(case, model, theirs) <= TOLERANCE

    @pytest.mark.parametrize("init", ["pissa", "olora"])
    def test_a_start_from_the_base_while_another_has_changed_it(self, init, tmp_path):
        theirs = with_peft(SINGLE, init_lora_weights=init)
        theirs.save_pretrained(tmp_path)
        model = with_ours(SINGLE, init="pissa").model
        lora = LoraModel.load_adapter(model, tmp_path, "second")
        lora.set_adapter("second")
        assert difference(SINGLE, model, theirs) <= 1e-6  # float32
        lora.unload()
        assert difference(SINGLE, model, SINGLE.build()) == 0

    def test_both_are_written_against_the_base(self, tmp_path):
        lora = with_ours(LINEAR, init="pissa")
        lora.add_adapter("second", LoraConfig(r=2, target_modules=["fc"], init="olora"))
        for name in ("default", "second"):
            lora.set_adapter(name)
            lora.save_adapter(tmp_path / name, format="peft")
            assert difference(LINEAR, read_by_peft(LINEAR, tmp_path / name), lora.model) <= TOLERANCE

    def test_not_while_something_is_merged(self, tmp_path, untouched):
        with_peft(LINEAR).save_pretrained(tmp_path)
        lora = with_ours(LINEAR)
        lora.merge_adapter()
        with pytest.raises(StateError, match="is merged"):
            LoraModel.load_adapter(lora.model, tmp_path, "second")
        with pytest.raises(StateError, match="is merged"):
            lora.save_adapter(tmp_path / "new", format="peft")


class TestFolders:
    def test_named_adapters_are_in_subfolders(self, tmp_path, untouched):
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(LINEAR.build(), peft.LoraConfig(r=2, target_modules=["fc"]), "night")
        model.add_adapter("rain", peft.LoraConfig(r=3, target_modules=["inner.fc"]))
        moved(model)
        model.save_pretrained(tmp_path)
        refused(LINEAR, tmp_path, untouched, "holds 2 adapters of PEFT: 'night', 'rain'")
        for name in ("night", "rain"):
            ours = LINEAR.build()
            LoraModel.load_adapter(ours, tmp_path / name)
            model.set_adapter(name)
            assert difference(LINEAR, ours, model.eval()) <= TOLERANCE

    @pytest.mark.parametrize(
        ("folder", "name"),
        [
            pytest.param("night", "night", id="of an adapter"),
            pytest.param("vit 1.5", "default", id="of another name"),
        ],
    )
    def test_a_single_subfolder_is_found(self, folder, name, tmp_path):
        peft = pytest.importorskip("peft")
        peft.get_peft_model(LINEAR.build(), peft.LoraConfig(target_modules=["fc"]), "night").save_pretrained(tmp_path)
        (tmp_path / "night").rename(tmp_path / folder)
        assert LoraModel.load_adapter(LINEAR.build(), tmp_path).active_adapters == (name,)

    def test_the_file_of_tensors_means_its_folder(self, tmp_path):
        with_peft(LINEAR).save_pretrained(tmp_path)
        assert LoraModel.load_adapter(LINEAR.build(), tmp_path / TENSORS).active_adapters == ("default",)

    def test_a_pickle_is_refused(self, tmp_path, untouched):
        with_peft(LINEAR).save_pretrained(tmp_path)
        torch.save(load_file(tmp_path / TENSORS), tmp_path / "adapter_model.bin")
        (tmp_path / TENSORS).unlink()
        refused(LINEAR, tmp_path, untouched, r"adapter_model\.bin is a pickle.*save it again")

    def test_missing_tensors_are_said(self, tmp_path, untouched):
        with_peft(LINEAR).save_pretrained(tmp_path)
        (tmp_path / TENSORS).unlink()
        refused(LINEAR, tmp_path, untouched, f"{CONFIG} and no {TENSORS}")


class TestConfigs:
    @pytest.mark.parametrize(
        ("fields", "match"),
        [
            pytest.param({"peft_type": "LOHA"}, "method 'LOHA'.*use the merged model.*peft.save_as_lora", id="method"),
            pytest.param({"trainable_token_indices": [1]}, "trainable_token_indices", id="tokens"),
            pytest.param({"layer_replication": [[0, 2]]}, "layer_replication", id="replication"),
            pytest.param({"kasa_config": {"beta": 1e-4}}, "kasa_config.*another method", id="KaSA"),
            pytest.param({"later_config": {"a": 1}}, "later_config.*not known here", id="a field of a later version"),
        ],
    )
    def test_a_field_without_a_meaning_here_is_refused(self, fields, match, tmp_path, untouched):
        with_peft(LINEAR).save_pretrained(tmp_path)
        edit_config(tmp_path, **fields)
        refused(LINEAR, tmp_path, untouched, match)

    @pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"peft_type": "LORA"', b"\xff\xfe"])
    def test_a_config_that_is_none(self, content, tmp_path, untouched):
        with_peft(LINEAR).save_pretrained(tmp_path)
        (tmp_path / CONFIG).write_bytes(content)
        refused(LINEAR, tmp_path, untouched, CONFIG)


class TestHostileFiles:
    """Nothing is allocated that the file does not have."""

    def test_a_header_of_100_megabytes(self, tmp_path, untouched):
        with_peft(LINEAR).save_pretrained(tmp_path)
        with (tmp_path / TENSORS).open("wb") as file:
            file.write(struct.pack("<Q", 100 << 20))
            file.truncate(200 << 20)  # sparse
        refused(LINEAR, tmp_path, untouched, "its header would have 104,857,600 bytes")

    def test_a_header_longer_than_the_file(self, tmp_path, untouched):
        with_peft(LINEAR).save_pretrained(tmp_path)
        (tmp_path / TENSORS).write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
        refused(LINEAR, tmp_path, untouched, "its header would have")

    def test_an_index_of_100_gigabytes(self, tmp_path, untouched):
        with_peft(LINEAR).save_pretrained(tmp_path)
        shape = [100 << 30]
        entry = {"base_model.model.fc.lora_A.weight": {"dtype": "U8", "shape": shape, "data_offsets": [0, 100 << 30]}}
        content = json.dumps(entry).encode()
        (tmp_path / TENSORS).write_bytes(struct.pack("<Q", len(content)) + content)
        refused(LINEAR, tmp_path, untouched, "damaged")

    def test_a_config_of_100_megabytes(self, tmp_path, untouched):
        with_peft(LINEAR).save_pretrained(tmp_path)
        with (tmp_path / CONFIG).open("wb") as file:
            file.truncate(100 << 20)
        refused(LINEAR, tmp_path, untouched, "at most 16,777,216 are read")

    def test_deeply_nested_json(self, tmp_path, untouched):
        with_peft(LINEAR).save_pretrained(tmp_path)
        (tmp_path / CONFIG).write_text("[" * 100_000)
        refused(LINEAR, tmp_path, untouched, "cannot be read as JSON")

    @pytest.mark.parametrize(
        "fields",
        slow_but(
            [
                {"target_modules": "(a+)+b"},
                {"exclude_modules": "(a+)+b"},
                {"modules_to_save": ["(a+)+b"]},
                {"rank_pattern": {"(a+)+b": 2}},
                {"alpha_pattern": {"(a+)+b": 2}},
                {"layers_to_transform": [0], "layers_pattern": "(a+)+b"},
            ],
            [{"target_modules": "(a+)+b"}, {"layers_to_transform": [0], "layers_pattern": "(a+)+b"}],
        ),
        ids=str,
    )
    def test_an_expression_that_takes_for_ever(self, fields, tmp_path, untouched, monkeypatch):
        monkeypatch.setattr(foreign_patterns, "_SECONDS", 1.0)
        name = "a" * 40
        case = Case("", lambda: nn.ModuleDict({name: nn.Linear(4, 4)}), {"target_modules": [name]})
        with_peft(case).save_pretrained(tmp_path)
        edit_config(tmp_path, **fields)
        refused(case, tmp_path, untouched, "take more than 1 seconds")
