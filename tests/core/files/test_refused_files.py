"""Every kind of damage to an adapter folder, and every other base, is refused with the model untouched."""

import contextlib
import hashlib
import json
import os
import shutil
import struct

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from lora_plugins import AdapterFileError, LoraModel
from lora_plugins.files import MANIFEST, PackedAdapter
from lora_plugins.files.manifest import is_as_written
from tests.core.file_cases import (
    QUICK,
    adapt,
    assert_same_state,
    build,
    manifest_of,
    output,
    own_tensors,
    rewrite,
    tensor_file,
    write_manifest,
)


def refused(folder, untouched, match=".", model=None):
    model = build() if model is None else model
    with untouched(model), pytest.raises(AdapterFileError, match=match):
        LoraModel.load_adapter(model, folder)


def drop(key):
    def change(manifest, tensors):
        del manifest["tensors"][key], tensors[key]

    return change


def put(key, tensor):
    def change(manifest, tensors):
        tensors[key] = tensor
        manifest["tensors"][key] = {"dtype": str(tensor.dtype)[6:], "shape": list(tensor.shape)}

    return change


A, B, HEAD = "lora/blocks.0/lora_A", "lora/blocks.0/lora_B", "value/head.weight"


class TestExactDifference:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            pytest.param(lambda m, t: t.pop(A), f"1 tensor only in the manifest .'{A}'.", id="missing in the file"),
            pytest.param(lambda m, t: m["tensors"].pop(A), f"1 only in the file .'{A}'.", id="missing in the manifest"),
            pytest.param(drop(A), f"1 tensor only in this model .'{A}'.", id="missing in both"),
            pytest.param(drop(HEAD), f"only in this model .'{HEAD}'.", id="head missing in both"),
            pytest.param(put("lora/x/lora_A", torch.ones(2)), "1 only in the adapter .'lora/x/lora_A'.", id="surplus"),
            pytest.param(put("recipe/blocks.0//A", torch.ones(2)), "'recipe/blocks.0//A'", id="surplus recipe"),
            pytest.param(put(A, torch.ones(2, 7)), rf"'{A}' is \[2, 7\]; this model needs \[2, 6\]", id="shape of A"),
            pytest.param(put(B, torch.ones(6, 3)), rf"'{B}' is \[6, 3\]; this model needs \[6, 2\]", id="shape of B"),
            pytest.param(put(HEAD, torch.ones(4, 18)), rf"'{HEAD}' is \[4, 18\].*\[3, 18\]", id="shape of the head"),
            pytest.param(put(A, torch.ones(2, 6, dtype=torch.int64)), f"'{A}'.*int64.*a floating one", id="type of A"),
            pytest.param(put(HEAD, torch.ones(3, 18, dtype=torch.bool)), f"'{HEAD}'.*bool", id="type of the head"),
            pytest.param(
                lambda m, t: t.update({A: t[A].double()}), f"'{A}' is .*float64.*the manifest says.*float32",
                id="type in the file only",
            ),
            pytest.param(
                lambda m, t: m["tensors"][A].update(shape=[6, 2]), f"'{A}' is .*2, 6.*the manifest says.*6, 2",
                id="shape in the manifest only",
            ),
            pytest.param(lambda m, t: m["layers"].pop("qkv"), "only in this model .'qkv'.", id="layer missing"),
            pytest.param(
                lambda m, t: m["layers"].update(new={"plugin": "linear"}), "only in the adapter .'new'.",
                id="layer surplus",
            ),
            pytest.param(lambda m, t: m["layers"]["qkv"].update(r=2), "'qkv' has r 2 .* would have 3", id="rank"),
            pytest.param(lambda m, t: m["layers"]["qkv"].update(scaling=1.0), "'qkv' has scaling", id="scaling"),
            pytest.param(lambda m, t: m["layers"]["qkv"].update(plugin="conv"), "type 'conv' of lora-", id="plugin"),
            pytest.param(lambda m, t: m["config"].update(alpha=9), "has scaling", id="alpha"),
            pytest.param(lambda m, t: m["config"].update(bias="all"), "only in this model", id="bias"),
            pytest.param(lambda m, t: m["config"].update(ranks=9), "no field 'ranks'", id="config field"),
            pytest.param(lambda m, t: m["config"].update(init="gone"), "its config 'gone'", id="init"),
            pytest.param(lambda m, t: m["base"].pop("qkv.weight"), "'qkv.weight'", id="fingerprint missing"),
        ],
    )  # fmt: skip
    def test_it_is_listed_and_the_model_is_untouched(self, folder, untouched, change, words):
        rewrite(folder, change)
        refused(folder, untouched, words)

    @pytest.mark.parametrize("change", [drop, lambda key: put(key, torch.ones(5, 5))], ids=["missing", "shape"])
    def test_the_recipe_of_a_changed_base_must_be_whole(self, tmp_path, untouched, change):
        # Five iterations at two bits keep a later iterate, which has a recipe.
        lora = adapt(build(), init="loftq", init_options={"iterations": 5, "bits": 2})
        lora.save_adapter(tmp_path)
        key = next(key for key in manifest_of(tmp_path)["tensors"] if key.startswith("recipe/"))
        rewrite(tmp_path, change(key))
        refused(tmp_path, untouched)

    def test_a_changed_base_that_cannot_be_rebuilt_is_refused(self, tmp_path, untouched):
        lora = adapt(build(), init="loftq")
        lora.save_adapter(tmp_path)
        model = build()
        with torch.no_grad():
            # The largest weight of a block scales the block: far too little for a fingerprint, enough for a bit.
            block = model.qkv.weight.flatten()[:64]
            block[block.abs().argmax()] *= 1.001
        refused(tmp_path, untouched, r"changed base.*'qkv\.weight'.*original", model)

    def test_an_adapter_in_memory_is_checked_just_as_well(self, untouched):
        lora = adapt(build())
        packed = lora.pack("default")
        tensors = {key: value for key, value in packed.tensors.items() if key != A}
        model = build()
        with untouched(model), pytest.raises(AdapterFileError, match=A):
            LoraModel.load_packed(model, PackedAdapter(packed.manifest, tensors))
        with untouched(model), pytest.raises(AdapterFileError, match="format"):
            LoraModel.load_packed(model, PackedAdapter({}, packed.tensors))


class TestWrongModel:
    @pytest.mark.parametrize(
        ("make", "words"),
        [
            pytest.param(lambda: build(seed=4), r"another base.*'blocks\.0\.weight'", id="other weights"),
            pytest.param(lambda: build(classes=5), r"value/head.weight", id="other head"),
            pytest.param(lambda: build(width=9), r"this model needs", id="other width"),
            pytest.param(lambda: nn.Sequential(nn.Linear(6, 6)), "does not fit this model", id="other architecture"),
            pytest.param(nn.Sequential, "does not fit this model", id="no layer at all"),
        ],
    )
    def test_another_model_is_refused_by_what_differs(self, saved, untouched, make, words):
        refused(saved[0], untouched, words, make())

    def test_one_weight_that_differs_is_enough(self, saved, untouched):
        model = build()
        nn.init.normal_(model.blocks[1].weight)
        refused(saved[0], untouched, r"'blocks\.1\.weight' differ.*1 of 4", model)

    def test_a_merged_model_is_another_base(self, saved, untouched):
        model = build()
        adapt(model).merge_and_unload()
        refused(saved[0], untouched, "another base", model)

    def test_an_adapted_base_is_the_same_base(self, saved):
        model = build()
        adapt(model, "first", modules_to_save=["head"])
        lora = LoraModel.load_adapter(model, saved[0], "second")
        lora.set_adapter("second")
        assert torch.equal(output(model), saved[1])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes here")
class TestFilesWithoutAnEnd:
    @pytest.mark.parametrize("what", ["pipe", "device"])
    @pytest.mark.parametrize("file", ["manifest", "tensors"])
    def test_they_are_refused(self, saved, untouched, tmp_path, file, what):
        folder = tmp_path / "copy"
        shutil.copytree(saved[0], folder)
        path = folder / MANIFEST if file == "manifest" else tensor_file(folder)
        path.unlink()
        os.mkfifo(path) if what == "pipe" else path.symlink_to("/dev/zero")
        refused(folder, untouched, "not a regular file")


class TestDamage:
    @pytest.mark.parametrize("kept", [0, 1, 7, 8, 100, -1])
    def test_a_truncated_tensor_file(self, folder, untouched, kept):
        path = tensor_file(folder)
        path.write_bytes(path.read_bytes()[:kept])
        refused(folder, untouched, "truncated or changed")

    @QUICK
    @given(st.data())
    def test_one_changed_byte_anywhere(self, saved, folder, untouched, data):
        content = bytearray(tensor_file(saved[0]).read_bytes())
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= data.draw(st.integers(1, 255))
        tensor_file(folder).write_bytes(content)
        refused(folder, untouched, "truncated or changed")

    def test_a_missing_tensor_file(self, folder, untouched):
        tensor_file(folder).unlink()
        refused(folder, untouched, r"adapter-.*cannot be read.*Copy the whole adapter folder")

    def test_a_missing_manifest(self, folder, untouched):
        (folder / MANIFEST).unlink()
        refused(folder, untouched, r"adapter\.json does not exist")

    def test_a_missing_folder(self, tmp_path, untouched):
        (tmp_path / "nowhere_else").mkdir()
        refused(tmp_path / "nowhere", untouched, "does not exist: .* has no 'nowhere'.* 'nowhere_else'")

    def test_a_file_instead_of_a_folder(self, folder, untouched):
        refused(folder / MANIFEST, untouched)

    @pytest.mark.parametrize(
        "name",
        [
            "../{}",
            "sub/{}",
            "/etc/hostname",
            "..",
            ".",
            "",
            "./{}",
            "{}/",
            "a\0b",
            "\ud800",
            "x" * 300,
            None,
            3,
            ["{}"],
        ],
        ids=repr,
    )
    def test_a_file_that_is_not_in_the_folder(self, folder, untouched, name):
        inside = folder / "inside"
        inside.mkdir()
        (inside / "sub").mkdir()
        path = tensor_file(folder)
        for place in (inside, inside / "sub"):
            (place / path.name).write_bytes(path.read_bytes())
        name = name.format(path.name) if isinstance(name, str) else name
        write_manifest(inside, {**manifest_of(folder), "file": name})
        refused(inside, untouched)

    def test_a_newer_format(self, folder, untouched):
        write_manifest(folder, {**manifest_of(folder), "format": 2, "lora_plugins": "7.1"})
        refused(folder, untouched, r"format 2.*reads up to 1.*written by lora_plugins 7\.1: upgrade")

    @pytest.mark.parametrize("version", [None, "1", 1.5, [], True, 0, -1])
    def test_a_format_that_is_none(self, folder, untouched, version):
        write_manifest(folder, {**manifest_of(folder), "format": version})
        refused(folder, untouched, "format")

    @pytest.mark.parametrize(
        "content",
        [b"", b"{", b"null", b"[]", b'"text"', b"3", b"\xff\xfe", b"{}", b'{"format": 1}', b"[" * 100_000, b"nan"],
        ids=["empty", "cut", "null", "list", "text", "number", "no utf-8", "empty object", "bare", "deep", "no json"],
    )
    def test_a_manifest_that_is_none(self, folder, untouched, content):
        (folder / MANIFEST).write_bytes(content)
        refused(folder, untouched)

    def test_an_entry_nested_too_deep_to_be_summed_up(self, folder):
        """Between Python's limits to nesting in reading and in writing."""
        nested: list = []
        for _ in range(10_000):
            nested = [nested]
        assert is_as_written(manifest_of(folder))
        assert not is_as_written({**manifest_of(folder), "more": nested})

    @pytest.mark.parametrize(
        "entry",
        ["adapter_name", "config", "init", "variant", "layer_types", "layers", "tensors", "base", "changed", "file",
         "sha256"],
    )  # fmt: skip
    def test_a_missing_entry(self, folder, untouched, entry):
        manifest = manifest_of(folder)
        del manifest[entry]
        write_manifest(folder, manifest)
        refused(folder, untouched)

    def test_a_missing_checksum_of_the_manifest(self, folder, untouched):
        manifest = manifest_of(folder)
        del manifest["manifest_sha256"]
        (folder / MANIFEST).write_text(json.dumps(manifest))
        refused(folder, untouched, "is not what was written: it was damaged or edited")

    @pytest.mark.parametrize("name", ["", "a.b", "a/b", " "])
    def test_an_adapter_name_that_is_none(self, folder, untouched, name):
        write_manifest(folder, {**manifest_of(folder), "adapter_name": name})
        refused(folder, untouched, "adapter_name")


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in items:
        yield from places(entry, (*path, key))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)


class TestRandomDamage:
    """Whatever is in the files: a refusal with the model untouched, or a load that computes what was saved."""

    @staticmethod
    def load(folder, expected):
        model, fresh = build(), build()
        try:
            LoraModel.load_adapter(model, folder)
        except AdapterFileError:
            assert_same_state(own_tensors(model), own_tensors(fresh))
            assert [type(m) for m in model.modules()] == [type(m) for m in fresh.modules()]
            assert all(p.requires_grad for p in model.parameters())
        else:
            assert torch.equal(output(model), expected)

    @settings(QUICK, max_examples=250)
    @given(st.data())
    def test_one_entry_of_the_manifest(self, saved, folder, data):
        manifest = manifest_of(saved[0])
        *path, last = data.draw(st.sampled_from([place for place in places(manifest) if place]))
        holder = manifest
        for key in path:
            holder = holder[key]
        if data.draw(st.booleans()):
            holder[last] = data.draw(json_values)
        else:
            del holder[last]
        write_manifest(folder, manifest)
        self.load(folder, saved[1])

    @settings(QUICK, max_examples=100)
    @given(st.data())
    def test_a_manifest_that_says_anything_else(self, saved, folder, data):
        """One bit of `dropout` is a valid config, of another training."""
        content = bytearray((saved[0] / MANIFEST).read_bytes())
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] ^= 1 << data.draw(st.integers(0, 7))
        written = {key: value for key, value in manifest_of(saved[0]).items() if key != "manifest_sha256"}
        with contextlib.suppress(ValueError):  # a checksum under another name takes nothing from what there is
            found = json.loads(content)
            assume({key: found.get(key) for key in written} != written)
        (folder / MANIFEST).write_bytes(content)
        with pytest.raises(AdapterFileError):
            LoraModel.load_adapter(build(), folder)

    @settings(QUICK, max_examples=100)
    @given(st.data())
    def test_bytes_of_the_manifest(self, saved, folder, data):
        content = bytearray((saved[0] / MANIFEST).read_bytes())
        start = data.draw(st.integers(0, len(content) - 1))
        length = data.draw(st.integers(0, 20))
        content[start : start + length] = data.draw(st.binary(max_size=20))
        (folder / MANIFEST).write_bytes(content)
        self.load(folder, saved[1])

    @settings(QUICK, max_examples=150)
    @given(st.data())
    def test_the_header_of_a_tensor_file_whose_sum_is_right(self, saved, folder, data):
        """The sum keeps accidents out; a file that was made so on purpose has to be refused by what it says."""
        content = bytearray(tensor_file(saved[0]).read_bytes())
        (header,) = struct.unpack("<Q", content[:8])
        start = data.draw(st.integers(0, header + 7))
        end = min(start + data.draw(st.integers(0, 4)), header + 8)  # behind it are values, which may be any
        content[start:end] = data.draw(st.binary(max_size=4))
        manifest = manifest_of(saved[0])
        (folder / manifest["file"]).write_bytes(content)
        write_manifest(folder, {**manifest, "sha256": hashlib.sha256(content).hexdigest()})
        self.load(folder, saved[1])
