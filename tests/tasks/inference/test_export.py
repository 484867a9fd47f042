"""Exported networks answer as the task does."""

import json
import os
from contextlib import nullcontext
from pathlib import Path
from stat import S_IMODE

import pytest
import torch
from torch import nn

from benchmarks.serving.adapters import write_adapters, write_base
from lora_plugins import ConfigError
from lora_plugins.cli.main import main
from lora_plugins.tasks import (
    ImageClassificationTask,
    WeightsError,
    export_task,
    load_task,
    merged_task,
)
from lora_plugins.testing.full_disk import no_file_beyond

from ..conftest import tiny_vit


def export(arguments):
    return main(["export", *arguments])


class OfBatch(nn.Module):
    """Divides by the deviation over the batch, which a single image does not have."""

    def forward(self, x):
        return x / x.std(0)


class TestExport:
    @pytest.mark.parametrize(
        ("kind", "size", "resized"), [("labels", (16, 16), "bicubic"), ("masks", (64, 64), "bilinear")]
    )
    def test_torch_export(self, fitted, tmp_path, kind, size, resized):
        """At the size of the data, embedded or not, which the files know."""
        task = merged_task(fitted[kind][1]["adapter"])
        assert export_task(task, tmp_path / "m.pt2") < 1e-5
        images = torch.rand(3, 3, *size)
        said = {"class_names": "", "interpolation": ""}
        found = torch.export.load(tmp_path / "m.pt2", extra_files=said).module()(images)
        assert json.loads(said["class_names"]) == task.class_names
        assert said["interpolation"] == resized
        torch.testing.assert_close(found, task(images), atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("suffix", [".pt2", ".safetensors"])
    def test_a_task_on_any_device_leaves_files_for_all(self, fitted, tmp_path, suffix, device):
        """With --device; the task stays where it is."""
        task = merged_task(fitted["labels"][1]["adapter"]).to(device)
        export_task(task, tmp_path / f"m{suffix}")
        assert task.device.type == device.type
        if suffix == ".pt2":
            found = torch.export.load(tmp_path / "m.pt2").module()(torch.rand(3, 3, 16, 16))
            assert found.device.type == "cpu"

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_a_task_in_half_precision(self, fitted, tmp_path, dtype):
        task, images = merged_task(fitted["labels"][1]["adapter"]).to(dtype), torch.rand(2, 3, 16, 16)
        export_task(task, tmp_path / "m.pt2")
        torch.testing.assert_close(torch.export.load(tmp_path / "m.pt2").module()(images), task(images))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_onnx_of_a_task_in_half_precision_is_refused(self, fitted, tmp_path, dtype):
        """There, onnxruntime lacks operations, or rounds in other places than torch."""
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        task = merged_task(fitted["labels"][1]["adapter"]).to(dtype)
        with pytest.raises(ConfigError, match=rf"^The task is in {dtype}, .* Call task.float\(\) first"):
            export_task(task, tmp_path / "m.onnx")

    def test_weights_of_more_than_an_onnx_file_holds_are_refused_first(self, fitted, tmp_path):
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        task = merged_task(fitted["labels"][1]["adapter"])
        task.network.register_buffer("large", torch.zeros(1).expand(2**29))  # which takes 4 bytes here
        with pytest.raises(ConfigError, match=r"^The weights take 2.0 GiB, .* Name a .pt2 file"):
            export_task(task, tmp_path / "m.onnx")

    @pytest.mark.parametrize("size", [None, (24, 24)], ids=["written", "refused"])
    def test_a_task_that_is_trained_goes_on_as_it_was(self, fitted, tmp_path, size):
        task = merged_task(fitted["labels"][1]["adapter"]).train()
        task.network.norm.eval()
        modes = [module.training for module in task.modules()]
        with pytest.raises(ConfigError) if size else nullcontext():
            export_task(task, tmp_path / "m.pt2", size)
        assert [module.training for module in task.modules()] == modes

    def test_another_size(self, fitted, tmp_path, capsys):
        files = [str(fitted["masks"][1]["merged"]), str(tmp_path / "m.pt2")]
        assert export([*files, "--size", "32", "96"]) == 0
        printed = capsys.readouterr().out
        assert "logits as the task's, within" in printed
        assert "takes images (N, 3, 32, 96) in [0, 1], resized (bilinear), and normalizes them itself" in printed
        found = torch.export.load(files[1]).module()(torch.rand(1, 3, 32, 96))
        assert found.shape == (1, 4, 32, 96)

    @pytest.mark.parametrize("kind", ["labels", "masks"])
    def test_weights_alone_are_a_task_again(self, fitted, tmp_path, kind, capsys):
        file = tmp_path / "new" / "m.safetensors"
        assert export([str(fitted[kind][1]["adapter"]), str(file)]) == 0, capsys.readouterr().err
        task, again = merged_task(fitted[kind][1]["adapter"]), load_task(file)
        assert again.class_names == task.class_names
        images = torch.rand(2, 3, *task.image_size)
        assert torch.equal(again(images), task(images))

    @pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
    @pytest.mark.parametrize("suffix", [".pt2", ".safetensors"])
    def test_a_file_keeps_its_permissions(self, fitted, tmp_path, suffix):
        task, path = merged_task(fitted["labels"][1]["adapter"]), tmp_path / f"m{suffix}"
        path.touch()
        path.chmod(0o640)
        export_task(task, path)
        assert (path.stat().st_size > 0, S_IMODE(path.stat().st_mode)) == (True, 0o640)

    def test_what_rounding_may_lose_in_the_merge(self, fitted, tmp_path, capsys):
        files = [str(fitted["labels"][1]["adapter"]), str(tmp_path / "m.safetensors")]
        assert export([*files, "--max-error", "0"]) == 1
        assert "Allow it with max_error" in capsys.readouterr().err
        assert export([*files, "--max-error", "0.1"]) == 0

    @pytest.mark.parametrize("storage", ["nf4", "int8"])
    def test_an_adapter_on_a_stored_base(self, tmp_path, storage):
        base = write_base(ImageClassificationTask, tiny_vit(), tmp_path / "vit.safetensors")
        stored = {"quantize": storage, "quantize_options": {"min_size": 0}, "target_modules": ["qkv", "fc1"]}
        write_adapters(ImageClassificationTask, base, tmp_path, ["adapter"], r=2, **stored)
        assert export([str(tmp_path / "adapter"), str(tmp_path / "m.safetensors")]) == 0
        task, merged = load_task(tmp_path / "adapter"), load_task(tmp_path / "m.safetensors")
        assert merged.state_dict().keys() == ImageClassificationTask(base).state_dict().keys()
        images = torch.rand(3, 3, 16, 16)
        torch.testing.assert_close(merged(images), task(images), atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("ending", [".pt2", ".safetensors"])
    def test_a_diverged_network_is_refused_and_the_earlier_file_stays(self, fitted, tmp_path, ending):
        task, file = merged_task(fitted["labels"][1]["adapter"]), tmp_path / f"m{ending}"
        file.write_bytes(b"earlier")
        with torch.no_grad():
            next(task.network.parameters()).fill_(float("nan"))
        with pytest.raises(WeightsError, match=r"m\.\w+ .*\bis not written"):
            export_task(task, file)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {file.name: b"earlier"}

    def test_a_network_that_has_no_answer_for_one_image_is_refused(self, fitted, tmp_path):
        """The largest of differences, of which the second is NaN, was the first one."""
        task = merged_task(fitted["labels"][1]["adapter"])
        task.network.norm = OfBatch()
        with pytest.raises(WeightsError, match=r"m\.pt2 answers differently: by nan"):
            export_task(task, tmp_path / "m.pt2")
        assert not (tmp_path / "m.pt2").exists()

    def test_the_base_of_an_adapter_is_not_replaced(self, fitted, capsys):
        task, files = fitted["labels"]
        base = Path(task.model_config.weights)
        before = base.read_bytes()
        assert export([str(files["adapter"]), str(base)]) == 1
        assert f"The file is {base}, which the task is read from: it would be replaced" in capsys.readouterr().err
        assert base.read_bytes() == before

    def test_a_wrong_ending_or_place_is_told_before_the_model_is_loaded(self, tmp_path, capsys):
        assert export(["nowhere", "m.tflite"]) == 1
        assert "It ends in one of .pt2, .onnx, .safetensors." in capsys.readouterr().err
        assert export(["nowhere", str(tmp_path)]) == 1
        (tmp_path / "adapter.json").touch()  # as of an adapter, which could not be loaded
        assert export([str(tmp_path), "/proc/m.onnx"]) == 1
        assert "nothing can be written in /proc" in capsys.readouterr().err

    @pytest.mark.parametrize("ending", [".pt2", ".safetensors"])
    def test_a_disk_that_is_full_is_told_and_the_earlier_file_stays(self, fitted, tmp_path, capsys, ending):
        file = tmp_path / f"m{ending}"
        file.write_bytes(b"earlier")
        with no_file_beyond(1000):
            code = main(["export", str(fitted["labels"][1]["adapter"]), str(file)])
        last = f"error: File too large for {file}. Make room, or name a place on another disk."
        assert (code, capsys.readouterr().err.splitlines()[-1]) == (1, last)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {file.name: b"earlier"}

    def test_a_size_that_the_network_does_not_take(self, fitted, tmp_path, capsys):
        files = [str(fitted["labels"][1]["adapter"]), str(tmp_path / "m.pt2")]
        assert export([*files, "--size", "24", "24"]) == 1
        said = capsys.readouterr().err
        assert said.startswith("error: The network takes no images of 24x24: ")
        assert ".." not in said
        assert said.endswith("It was trained with 16x16: leave `size` (--size) out.\n")
        assert not [*tmp_path.iterdir()]

    def test_weights_alone_have_no_size_of_images(self, fitted, tmp_path, capsys):
        files = [str(fitted["labels"][1]["adapter"]), str(tmp_path / "m.safetensors")]
        assert export([*files, "--size", "24", "24"]) == 1
        assert "size (--size) is that of a program's images" in capsys.readouterr().err
        assert not [*tmp_path.iterdir()]

    def test_a_size_is_needed(self, fitted, tmp_path):
        task = load_task(fitted["masks"][1]["merged"])
        task.image_size = None
        with pytest.raises(ConfigError, match="--size HEIGHT WIDTH"):
            export_task(task, tmp_path / "m.pt2")

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of onnxscript
    @pytest.mark.filterwarnings("ignore::FutureWarning")
    @pytest.mark.filterwarnings("ignore::UserWarning")
    @pytest.mark.parametrize(("kind", "resized"), [("labels", "bicubic"), ("masks", "bilinear")])
    def test_onnx(self, fitted, tmp_path, kind, resized):
        runtime = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        assert export_task(merged_task(fitted[kind][1]["adapter"]), tmp_path / "m.onnx") < 1e-4
        session = runtime.InferenceSession(str(tmp_path / "m.onnx"))
        assert [each.shape[0] for each in (*session.get_inputs(), *session.get_outputs())] == ["batch", "batch"]
        said, task = session.get_modelmeta().custom_metadata_map, load_task(fitted[kind][1]["adapter"])
        assert json.loads(said["class_names"]) == task.class_names
        assert said["interpolation"] == resized
        assert [each.name for each in session.get_outputs()] == ["logits"]
