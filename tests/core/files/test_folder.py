"""Adapter folders: exact on the way out and back, and never half written."""

import copy
import json
import os
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_plugins import InitData, LoraConfig, LoraModel, StateError
from lora_plugins.files import MANIFEST, OWN_ENTRIES, PackedAdapter, read, write
from tests.core.file_cases import (
    adapt,
    assert_same_state,
    build,
    manifest_of,
    output,
    own_tensors,
    tensor_file,
)
from tests.state.interrupted import passed, stopped


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

    @pytest.mark.parametrize(
        ("path", "named"),
        [
            pytest.param("stem.bias", "'stem.bias' require", id="a bias of an adapted layer"),
            pytest.param("", r"\([0-9]+ more\) require", id="everything, as unfreezing a model does"),
        ],
    )
    def test_names_what_is_trained_beside_the_adapter(self, tmp_path, path, named):
        lora = adapt(build(), modules_to_save=["head"])
        lora.save_adapter(tmp_path / "frozen")
        for name, parameter in lora.model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or name.startswith(path))
        with pytest.warns(UserWarning, match=rf"{named} a gradient and are no part of an adapter") as caught:
            lora.save_adapter(tmp_path / "thawed")
        assert [entry.filename for entry in caught] == [__file__]
        assert "lora_" not in str(caught[0].message)
        assert "'head" not in str(caught[0].message)
        assert tensor_file(tmp_path / "thawed").read_bytes() == tensor_file(tmp_path / "frozen").read_bytes()

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

    @pytest.mark.parametrize("name", ["complex128", "float8_e8m0fnu", "float4_e2m1fn_x2"])
    def test_a_type_that_safetensors_does_not_bring_back(self, tmp_path, name):
        def scaled():
            model, bits = build(), torch.arange(64, 96, dtype=torch.uint8)
            model.head.register_buffer("scale", bits.view(getattr(torch, name)))
            model.head.register_buffer("first", model.head.scale[0].clone())
            return model

        model, fresh = scaled(), scaled()
        model.head.scale.view(torch.uint8).add_(1)
        lora = adapt(model, modules_to_save=["head"])
        LoraModel.load_adapter(fresh, lora.save_adapter(tmp_path))
        assert torch.equal(fresh.head.scale.view(torch.uint8), torch.arange(65, 97, dtype=torch.uint8))
        assert fresh.head.first.shape == ()
        assert fresh.head.first.dtype == getattr(torch, name)


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

    @pytest.mark.parametrize("name", ["notes.txt", "adapter-style.safetensors"])
    def test_saving_again_replaces_the_adapter_and_nothing_else(self, tmp_path, name):
        (tmp_path / name).write_text("mine")
        model = build()
        lora = adapt(model)
        lora.save_adapter(tmp_path)
        with torch.no_grad():
            model.qkv.lora_B["default"].add_(1)
        lora.save_adapter(tmp_path)
        assert len(list(tmp_path.iterdir())) == 3
        assert (tmp_path / name).read_text() == "mine"
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

    @pytest.mark.parametrize("again", [False, True], ids=["first save", "second save"])
    def test_a_stopped_save_leaves_no_file_without_a_manifest(self, tmp_path, again):
        old, new = (PackedAdapter({"format_version": 2}, {"a": torch.full((2,), value)}) for value in (0.0, 1.0))
        before = {*write(tmp_path / "old", old).iterdir()} if again else set()
        after = {*write(tmp_path / "new", new).iterdir()}

        def start(at):
            folder = tmp_path / f"stopped-{at}"
            return write(folder, old) if again else folder

        counted = start("counted")
        lines = passed(lambda: write(counted, new))
        for at in (at for at, line in enumerate(lines) if line.startswith(("files/", "utils/"))):
            folder = start(at)
            where, raised = stopped(lambda folder=folder: write(folder, new), at)
            left = {path.name for path in folder.glob("*")}
            assert raised, where
            assert left in [{path.name for path in whole} for whole in (before, after)], where

    def test_what_killed_processes_left_is_removed_by_the_next_save(self, tmp_path):
        lora = adapt(build())
        lora.save_adapter(tmp_path)
        for stops in ("replace", "fsync"):
            code = f"import os; os.{stops} = lambda *_: os._exit(1)\n" + textwrap.dedent(
                f"""
                from pathlib import Path
                from lora_plugins.utils import replace_file
                for name in {[path.name for path in tmp_path.glob("[!.]*")]}:
                    if os.fork() == 0:
                        replace_file(Path({str(tmp_path)!r}) / name, b"half")
                    os.wait()
                """
            )
            subprocess.run([sys.executable, "-c", code], check=True)
        old = tmp_path / f".adapter.json.{'0' * 8}-1-4567abcd"  # of another machine, days ago
        old.write_bytes(b"half")
        os.utime(old, (0, 0))
        running = tmp_path / f".adapter.json.{'0' * 8}-1-0123abcd"  # of another machine
        foreign = tmp_path / ".notes.txt.0123abcd"
        for path in (running, foreign):
            path.write_bytes(b"theirs")
        kept = tmp_path / f".adapter.json.{'0' * 8}-2-4567abcd"  # what cannot be removed is left
        (tmp_path.parent / "place").mkdir()
        kept.symlink_to(tmp_path.parent / "place")
        os.utime(kept, (0, 0))
        assert len(list(tmp_path.iterdir())) == 10
        lora.save_adapter(tmp_path)
        assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == {
            path.name for path in (running, foreign, kept)
        }

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


def test_an_entry_is_added_and_the_adapter_still_loads(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    folder = LoraModel(copy.deepcopy(model), LoraConfig(r=2)).save_adapter(tmp_path / "adapter")
    packed = read(folder)
    before = packed.manifest
    write(folder, PackedAdapter({**before, "made_with": {"seed": 3}}, packed.tensors))
    found = read(folder).manifest
    assert found["made_with"] == {"seed": 3}
    assert [key for key in before if found[key] != before[key]] == ["manifest_sha256"]
    LoraModel.load_adapter(model, folder)


def test_every_entry_of_a_manifest_is_known(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    config = LoraConfig(r=2, init="eva", init_options={"rho": 2.0}, quantize="nf4", quantize_options={"min_size": 0})
    folder = LoraModel(model, config, init_data=InitData([torch.randn(16, 8)])).save_adapter(tmp_path / "adapter")
    assert {"ranks", "stored"} <= read(folder).manifest.keys() == OWN_ENTRIES
