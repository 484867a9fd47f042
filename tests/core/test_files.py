"""Adapter folders: exact on the way out and back, and every kind of damage refused with the model untouched."""

import hashlib
import json
import os
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

from lora_plugins import AdapterFileError, LoraConfig, LoraModel, StateError
from lora_plugins.files import MANIFEST, PackedAdapter

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Net(nn.Module):
    """A little of everything: a convolution, statistics, a fused projection, and a head."""

    def __init__(self, classes=3, width=6):
        super().__init__()
        self.stem = nn.Conv2d(2, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width)
        self.head = nn.Linear(3 * width, classes)

    def forward(self, x):
        x = self.norm(self.stem(x)).mean(dim=(2, 3))
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(self.qkv(x))


def build(seed=3, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(**options).eval()


def adapt(model, name="default", **fields):
    """Adapts a model and moves everything that training would move."""
    fields = {"r": 2, "target_modules": ["stem", "blocks.0", "blocks.1", "qkv"], "init": "none", **fields}
    lora = LoraModel(model, LoraConfig(**fields), name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in key:
                parameter.add_(torch.randn_like(parameter))
        if fields.get("norm") == "track":
            model.norm.running_mean.add_(1.5)
    return lora


def output(model):
    x = torch.linspace(-1, 1, 3 * 2 * 4 * 4).reshape(3, 2, 4, 4)
    return model.eval()(x).detach()


def own_tensors(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(first, second):
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An adapter folder, and what the adapted model computes."""
    model = build()
    lora = adapt(model, modules_to_save=["head"], rank_pattern={"qkv": 3}, alpha_pattern={"stem": 2.0})
    return lora.save_adapter(tmp_path_factory.mktemp("saved") / "adapter"), output(model)


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of that folder, to be damaged."""
    for path in saved[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def tensor_file(folder):
    (path,) = folder.glob("*.safetensors")
    return path


def manifest_of(folder):
    return json.loads((folder / MANIFEST).read_text())


def write_manifest(folder, manifest):
    (folder / MANIFEST).write_text(json.dumps(manifest))


def rewrite(folder, change):
    """Lets `change` edit manifest and tensors, and writes both with a sum that is right again."""
    manifest, path = manifest_of(folder), tensor_file(folder)
    tensors = safetensors.torch.load_file(path)
    change(manifest, tensors)
    data = safetensors.torch.save(tensors)
    path.write_bytes(data)
    manifest["sha256"] = hashlib.sha256(data).hexdigest()
    write_manifest(folder, manifest)


def refused(folder, untouched, match=".", model=None):
    model = build() if model is None else model
    with untouched(model), pytest.raises(AdapterFileError, match=match):
        LoraModel.load_adapter(model, folder)


class TestRoundTrip:
    @pytest.mark.parametrize(
        "fields",
        [
            pytest.param({}, id="plain"),
            pytest.param({"modules_to_save": ["head"], "bias": "lora_only"}, id="head"),
            pytest.param({"bias": "all", "norm": "track"}, id="biases and statistics"),
            pytest.param({"use_rslora": True, "alpha": 5, "rank_pattern": {"blocks": 1}}, id="ranks"),
            pytest.param({"alpha_pattern": {"stem": 0.5}, "target_modules": "all"}, id="alphas"),
            pytest.param({"fused_parts": {"qkv": ["v", "q"]}, "init": "kaiming"}, id="parts"),
            pytest.param({"init": "loftq", "init_options": {"bits": 2, "iterations": 3, "block_size": 8}}, id="loftq"),
            pytest.param({"init": "loftq", "fused_parts": {"qkv": ["k"]}}, id="loftq of a part"),
            pytest.param({"layers_to_transform": [1], "target_modules": ["1"]}, id="block"),
            pytest.param({"target_modules": r"blocks\.\d", "exclude_modules": ["blocks.1"]}, id="expression"),
        ],
    )
    def test_bits_come_back(self, tmp_path, fields):
        model, fresh = build(), build()
        lora = adapt(model, **fields)
        lora.save_adapter(tmp_path / "adapter")
        loaded = LoraModel.load_adapter(fresh, tmp_path / "adapter")
        assert_same_state(own_tensors(model), own_tensors(fresh))
        assert torch.equal(output(model), output(fresh))
        assert loaded.adapters == lora.adapters
        assert loaded.active_adapters == ("default",)
        assert_same_state(own_tensors(loaded.unload()), own_tensors(build()))

    def test_loading_runs_no_init_and_draws_nothing(self, saved):
        before = torch.get_rng_state()
        LoraModel.load_adapter(build(), saved[0])
        assert torch.equal(torch.get_rng_state(), before)

    def test_a_base_in_half_precision_is_the_same_base(self, saved):
        model = build().to(torch.bfloat16)
        LoraModel.load_adapter(model, saved[0])
        x = torch.linspace(-1, 1, 96).reshape(3, 2, 4, 4).to(torch.bfloat16)
        # bfloat16 keeps 8 bits: a few steps of 2**-8 relative to outputs of about 1 to 10.
        torch.testing.assert_close(model(x).float(), saved[1], rtol=0.05, atol=0.1)

    def test_a_view_or_a_transposed_head_is_written_as_it_is(self, tmp_path):
        model = build()
        model.head.weight = nn.Parameter(model.head.weight.detach().T.contiguous().T)
        lora = adapt(model, modules_to_save=["head"])
        fresh = build()
        LoraModel.load_adapter(fresh, lora.save_adapter(tmp_path))
        assert_same_state(own_tensors(model), own_tensors(fresh))


class TestTheFolder:
    def test_it_holds_json_and_safetensors_and_nothing_pickled(self, saved):
        names = sorted(path.name for path in saved[0].iterdir())
        assert names == sorted([MANIFEST, tensor_file(saved[0]).name])
        data = tensor_file(saved[0]).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        assert set(json.loads(data[8 : 8 + length])) == set(manifest_of(saved[0])["tensors"])

    def test_the_manifest_says_what_is_in_it(self, saved):
        manifest = manifest_of(saved[0])
        assert manifest["format"] == 1
        assert manifest["adapter_name"] == "default"
        assert LoraConfig.from_dict(manifest["config"]).rank_pattern == {"qkv": 3}
        assert {name: (d["r"], d["alpha"], d["scaling"]) for name, d in manifest["layers"].items()} == {
            "stem": (2, 2.0, 1.0), "blocks.0": (2, 8.0, 4.0), "blocks.1": (2, 8.0, 4.0), "qkv": (3, 8.0, 8 / 3),
        }  # fmt: skip
        assert {d["distribution"] for d in manifest["layers"].values()} == {"lora-plugins"}
        assert (manifest["init"]["name"], manifest["init"]["distribution"]) == ("none", "lora-plugins")
        assert manifest["tensors"]["value/head.weight"] == {"dtype": "float32", "shape": [3, 18]}
        assert set(manifest["base"]) == {"stem.weight", "blocks.0.weight", "blocks.1.weight", "qkv.weight"}

    def test_keys_need_no_guessing(self, saved):
        assert {key.split("/")[0] for key in manifest_of(saved[0])["tensors"]} == {"lora", "value"}
        assert "lora/blocks.0/lora_A" in manifest_of(saved[0])["tensors"]

    def test_it_is_small(self, saved):
        """The trainable tensors, and a few kilobytes of text; not the base."""
        size = sum(d["shape"][0] * (d["shape"] + [1])[1] * 4 for d in manifest_of(saved[0])["tensors"].values())
        assert tensor_file(saved[0]).stat().st_size < size + 2048

    def test_saving_again_replaces_the_adapter_and_nothing_else(self, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        model = build()
        lora = adapt(model)
        lora.save_adapter(tmp_path)
        with torch.no_grad():
            model.qkv.lora_B["default"].add_(1)
        lora.save_adapter(tmp_path)
        assert len(list(tmp_path.iterdir())) == 3
        assert (tmp_path / "notes.txt").read_text() == "mine"
        fresh = build()
        LoraModel.load_adapter(fresh, tmp_path)
        assert torch.equal(output(model), output(fresh))

    def test_saving_twice_writes_the_same_bytes(self, tmp_path):
        lora = adapt(build())
        first, second = lora.save_adapter(tmp_path / "a"), lora.save_adapter(tmp_path / "b")
        assert [p.read_bytes() for p in sorted(first.iterdir())] == [p.read_bytes() for p in sorted(second.iterdir())]

    @pytest.mark.skipif(os.name != "posix", reason="file modes are those of POSIX")
    def test_files_have_the_mode_that_any_new_file_has(self, saved, tmp_path):
        (tmp_path / "any").touch()
        assert {p.stat().st_mode for p in saved[0].iterdir()} == {(tmp_path / "any").stat().st_mode}

    def test_saving_touches_nothing(self, tmp_path, untouched):
        model = build()
        lora = adapt(model, modules_to_save=["head"])
        with untouched(model):
            lora.save_adapter(tmp_path)


class TestAdapterNames:
    def test_an_adapter_can_be_loaded_under_another_name(self, saved):
        model = build()
        lora = LoraModel.load_adapter(model, saved[0], "other-name")
        assert lora.active_adapters == ("other-name",)
        assert torch.equal(output(model), saved[1])

    def test_two_adapters_of_one_model_are_two_folders(self, tmp_path):
        model = build()
        lora = adapt(model, "one")
        first = output(model)
        lora.add_adapter("two", LoraConfig(r=1, init="none", target_modules=["qkv"]))
        lora.set_adapter("two")
        second = output(model)
        for name in ("one", "two"):
            lora.save_adapter(tmp_path / name, name)
        fresh = build()
        loaded = LoraModel.load_adapter(fresh, tmp_path / "two")
        LoraModel.load_adapter(fresh, tmp_path / "one")
        assert loaded.active_adapters == ("two",)
        assert torch.equal(output(fresh), second)
        loaded.set_adapter("one")
        assert torch.equal(output(fresh), first)

    def test_names_swapped_at_loading(self, tmp_path):
        model = build()
        lora = adapt(model, "one")
        first = output(model)
        lora.add_adapter("two", LoraConfig(r=1, init="none", target_modules=["qkv"]))
        for name in ("one", "two"):
            lora.save_adapter(tmp_path / name, name)
        fresh = build()
        LoraModel.load_adapter(fresh, tmp_path / "one", "two")
        LoraModel.load_adapter(fresh, tmp_path / "two", "one")
        assert torch.equal(output(fresh), first)

    def test_a_name_that_is_taken_is_refused(self, saved, untouched):
        model = build()
        LoraModel.load_adapter(model, saved[0])
        with untouched(model), pytest.raises(ValueError, match="has an adapter 'default' already"):
            LoraModel.load_adapter(model, saved[0])

    def test_several_active_adapters_need_a_name(self, tmp_path):
        lora = adapt(build(), "one")
        lora.add_adapter("two", LoraConfig(r=1, target_modules=["qkv"]))
        lora.set_adapter(["one", "two"])
        with pytest.raises(StateError, match="2 adapters are active"):
            lora.save_adapter(tmp_path / "adapter")
        assert not (tmp_path / "adapter").exists()

    def test_nothing_is_saved_or_loaded_while_merged(self, tmp_path, saved, untouched):
        model = build()
        lora = adapt(model)
        lora.merge_adapter()
        with untouched(model), pytest.raises(StateError, match="merged"):
            lora.save_adapter(tmp_path / "adapter")
        with untouched(model), pytest.raises(StateError, match="merged"):
            LoraModel.load_adapter(model, saved[0], "second")
        assert not (tmp_path / "adapter").exists()


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
            pytest.param(lambda m, t: t.pop(A), f"1 tensors only in the manifest .'{A}'.", id="missing in the file"),
            pytest.param(lambda m, t: m["tensors"].pop(A), f"1 only in the file .'{A}'.", id="missing in the manifest"),
            pytest.param(drop(A), f"1 tensors only in this model .'{A}'.", id="missing in both"),
            pytest.param(drop(HEAD), f"only in this model .'{HEAD}'.", id="head missing in both"),
            pytest.param(put("lora/x/lora_A", torch.ones(2)), "1 only in the adapter .'lora/x/lora_A'.", id="surplus"),
            pytest.param(put("recipe/blocks.0//A", torch.ones(2)), "'recipe/blocks.0//A'", id="surplus recipe"),
            pytest.param(put(A, torch.ones(2, 7)), rf"'{A}' is \[2, 7\]; this model needs \[2, 6\]", id="shape of A"),
            pytest.param(put(B, torch.ones(6, 3)), rf"'{B}' is \[6, 3\]; this model needs \[6, 2\]", id="shape of B"),
            pytest.param(put(HEAD, torch.ones(4, 18)), rf"'{HEAD}' is \[4, 18\].*\[3, 18\]", id="shape of the head"),
            pytest.param(put(A, torch.ones(2, 6, dtype=torch.int64)), f"'{A}'.*int64", id="type of A"),
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
            pytest.param(lambda m, t: m["layers"].update(new={}), "only in the adapter .'new'.", id="layer surplus"),
            pytest.param(lambda m, t: m["layers"]["qkv"].update(r=2), "'qkv' has r 2 .* would have 3", id="rank"),
            pytest.param(lambda m, t: m["layers"]["qkv"].update(scaling=1.0), "'qkv' has scaling", id="scaling"),
            pytest.param(lambda m, t: m["layers"]["qkv"].update(plugin="conv"), "'qkv' has plugin 'conv'", id="plugin"),
            pytest.param(lambda m, t: m["config"].update(alpha=9), "has scaling", id="alpha"),
            pytest.param(lambda m, t: m["config"].update(bias="all"), "only in this model", id="bias"),
            pytest.param(lambda m, t: m["config"].update(ranks=9), "no field 'ranks'", id="config field"),
            pytest.param(lambda m, t: m["config"].update(init="gone"), "no init 'gone'", id="init"),
            pytest.param(lambda m, t: m["base"].pop("qkv.weight"), "'qkv.weight'", id="fingerprint missing"),
        ],
    )  # fmt: skip
    def test_it_is_listed_and_the_model_is_untouched(self, folder, untouched, change, words):
        rewrite(folder, change)
        refused(folder, untouched, words)

    def test_the_recipe_of_a_changed_base_must_be_whole(self, tmp_path, untouched):
        lora = adapt(build(), init="loftq", init_options={"iterations": 5, "bits": 2})
        lora.save_adapter(tmp_path)
        keys = [key for key in manifest_of(tmp_path)["tensors"] if key.startswith("recipe/")]
        assert keys, "five iterations at two bits keep a later iterate, which has a recipe"
        rewrite(tmp_path, drop(keys[0]))
        refused(tmp_path, untouched)

    def test_a_recipe_of_another_shape_is_refused(self, tmp_path, untouched):
        lora = adapt(build(), init="loftq", init_options={"iterations": 5, "bits": 2})
        lora.save_adapter(tmp_path)
        key = next(key for key in manifest_of(tmp_path)["tensors"] if key.startswith("recipe/"))
        rewrite(tmp_path, put(key, torch.ones(5, 5)))
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


class TestDamage:
    @pytest.mark.parametrize("kept", [0, 1, 7, 8, 100, -1])
    def test_a_truncated_tensor_file(self, folder, untouched, kept):
        path = tensor_file(folder)
        path.write_bytes(path.read_bytes()[:kept])
        refused(folder, untouched, "truncated or changed")

    @QUICK
    @given(st.data())
    def test_one_changed_byte_anywhere(self, saved, tmp_path_factory, untouched, data):
        folder = tmp_path_factory.mktemp("byte")
        content = bytearray(tensor_file(saved[0]).read_bytes())
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= data.draw(st.integers(1, 255))
        (folder / tensor_file(saved[0]).name).write_bytes(content)
        (folder / MANIFEST).write_bytes((saved[0] / MANIFEST).read_bytes())
        refused(folder, untouched, "truncated or changed")

    def test_a_missing_tensor_file(self, folder, untouched):
        tensor_file(folder).unlink()
        refused(folder, untouched, r"adapter-.*cannot be read.*Copy the whole adapter folder")

    def test_a_missing_manifest(self, folder, untouched):
        (folder / MANIFEST).unlink()
        refused(folder, untouched, r"adapter\.json does not exist")

    def test_a_missing_folder(self, tmp_path, untouched):
        refused(tmp_path / "nowhere", untouched, "does not exist")

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

    @pytest.mark.parametrize(
        "entry", ["adapter_name", "config", "layers", "tensors", "base", "changed", "file", "sha256"]
    )
    def test_a_missing_entry(self, folder, untouched, entry):
        manifest = manifest_of(folder)
        del manifest[entry]
        write_manifest(folder, manifest)
        refused(folder, untouched)

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
    def test_one_entry_of_the_manifest(self, saved, tmp_path_factory, data):
        folder = tmp_path_factory.mktemp("manifest")
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
        (folder / tensor_file(saved[0]).name).write_bytes(tensor_file(saved[0]).read_bytes())
        self.load(folder, saved[1])

    @settings(QUICK, max_examples=100)
    @given(st.data())
    def test_bytes_of_the_manifest(self, saved, tmp_path_factory, data):
        folder = tmp_path_factory.mktemp("bytes")
        content = bytearray((saved[0] / MANIFEST).read_bytes())
        start = data.draw(st.integers(0, len(content) - 1))
        length = data.draw(st.integers(0, 20))
        content[start : start + length] = data.draw(st.binary(max_size=20))
        (folder / MANIFEST).write_bytes(content)
        (folder / tensor_file(saved[0]).name).write_bytes(tensor_file(saved[0]).read_bytes())
        self.load(folder, saved[1])

    @settings(QUICK, max_examples=150)
    @given(st.data())
    def test_the_header_of_a_tensor_file_whose_sum_is_right(self, saved, tmp_path_factory, data):
        """The sum keeps accidents out; a file that was made so on purpose has to be refused by what it says."""
        folder = tmp_path_factory.mktemp("header")
        content = bytearray(tensor_file(saved[0]).read_bytes())
        (header,) = struct.unpack("<Q", content[:8])
        start = data.draw(st.integers(0, header + 7))
        content[start : start + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
        manifest = manifest_of(saved[0])
        (folder / manifest["file"]).write_bytes(content)
        write_manifest(folder, {**manifest, "sha256": hashlib.sha256(content).hexdigest()})
        self.load(folder, saved[1])


ODD_NAMES = [
    "weight", "bias", "lora", "default", "base_layer", "lora_A", "lora_B", "lora_A_q", "base_model", "model", "value",
    "adapter", "module", "_orig_mod", "0", "a/b", "/", "//", "a/lora_A", "r/lora_A", "q", "recipe", "__metadata__",
    "a b", "ä", "层", "é", "e\u0301", "²", "a+b", "(", "[x]", "*", "^", "\n", "\\", '"', "'", "{}", "%s", "-",
]  # fmt: skip

module_names = st.one_of(
    st.sampled_from(ODD_NAMES),
    st.text(st.characters(exclude_characters=".", exclude_categories=["Cs"]), min_size=1, max_size=6),
).filter(lambda name: not hasattr(nn.Module(), name))


def named_model(paths, seed=0):
    """A model with a linear layer at each of these paths, of components joined by nothing but nesting."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        root = nn.Module()
        for path in sorted(paths, key=len, reverse=True):  # a container stays one where a shorter path ends at it
            holder = root
            for name in path[:-1]:
                if name not in holder._modules:
                    holder.add_module(name, nn.Module())
                holder = holder._modules[name]
            if path[-1] not in holder._modules:
                holder.add_module(path[-1], nn.Linear(3, 3))
        return root


class TestModuleNames:
    @settings(QUICK, max_examples=150)
    @given(st.lists(st.lists(module_names, min_size=1, max_size=3), min_size=1, max_size=6), module_names)
    @example([["a"], ["a/lora_A"], ["a", "q"], ["a/", "q"]], "q")
    @example([["weight"], ["lora", "default", "base_layer"], ["lora_A", "lora_B"]], "lora")
    def test_any_name_that_a_module_can_have_comes_back(self, tmp_path_factory, paths, head):
        folder = tmp_path_factory.mktemp("names")
        paths = [*paths, ["the head", head]]
        model, fresh = named_model(paths), named_model(paths)
        config = LoraConfig(r=1, init="none", modules_to_save=[f"the head.{head}"], bias="lora_only")
        lora = LoraModel(model, config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_()
        lora.save_adapter(folder)
        LoraModel.load_adapter(fresh, folder)
        assert_same_state(own_tensors(model), own_tensors(fresh))
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                assert torch.equal(module.weight, fresh.get_submodule(name).weight)
        lora.unload()
        assert_same_state(own_tensors(model), own_tensors(named_model(paths)))

    @pytest.mark.parametrize("name", [name for name in ODD_NAMES if not hasattr(nn.Module(), name)], ids=repr)
    def test_an_odd_name_is_matched_by_a_list(self, name):
        model = named_model([["first", name], ["second"]])
        plan = LoraModel.plan(model, LoraConfig(target_modules=[name], r=1))
        assert [layer.name for layer in plan.layers] == [f"first.{name}"]


class Killed(BaseException):
    """What stops a process is no `Exception`."""


class TestKilledWhileWriting:
    @pytest.mark.parametrize("step", [0, 1])
    @pytest.mark.parametrize("when", ["before", "after"])
    @pytest.mark.parametrize("error", [Killed, OSError])
    def test_the_old_adapter_or_the_new_one_is_there(self, tmp_path, monkeypatch, step, when, error):
        model = build()
        lora = adapt(model)
        old = output(model)
        lora.save_adapter(tmp_path)
        with torch.no_grad():
            model.qkv.lora_B["default"].add_(1)
        new = output(model)
        replaced, calls = os.replace, []

        def stop(source, target):
            calls.append(target)
            if len(calls) == step + 1:
                if when == "after":
                    replaced(source, target)
                raise error("no more")
            replaced(source, target)

        monkeypatch.setattr(os, "replace", stop)
        with pytest.raises(error):
            lora.save_adapter(tmp_path)
        monkeypatch.undo()
        fresh = build()
        LoraModel.load_adapter(fresh, tmp_path)
        # The manifest comes second and decides.
        assert torch.equal(output(fresh), new if (step, when) == (1, "after") else old)
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
        lora.save_adapter(tmp_path)
        assert len(list(tmp_path.iterdir())) == 2

    def test_a_full_disk_leaves_the_old_adapter(self, tmp_path, monkeypatch):
        model = build()
        lora = adapt(model)
        lora.save_adapter(tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

        def full(handle):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with torch.no_grad():
            model.qkv.lora_B["default"].add_(1)
        with pytest.raises(OSError, match="No space left"):
            lora.save_adapter(tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def test_tensors_are_on_the_disk_before_the_manifest(self, tmp_path, monkeypatch):
        order, replaced, synced = [], os.replace, os.fsync
        monkeypatch.setattr(os, "replace", lambda s, t: (order.append(Path(t).suffix), replaced(s, t)))
        monkeypatch.setattr(os, "fsync", lambda handle: (order.append("sync"), synced(handle)))
        adapt(build()).save_adapter(tmp_path)
        assert order == ["sync", ".safetensors", "sync", ".json"]
