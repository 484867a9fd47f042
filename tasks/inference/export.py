"""Exports a merged network for other runtimes: `lora-plugins export MODEL OUT.pt2` (or `OUT.onnx`).

The exported network takes images (N, channels, H, W) in [0, 1] of one size, by default the size that the task was
trained with, normalizes them, and returns logits; N is dynamic. What is written was loaded again first, and its logits
compared with those of the task. It holds the names of the classes, as a JSON list: `class_names` in the metadata of
ONNX, and among the extra files of `torch.export.load`.
"""

import io
import json
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from lora_plugins import ConfigError
from lora_plugins.errors import listing, sentence
from lora_plugins.field_checks import Check, check_fields, optional
from lora_plugins.integrations.lightning.module import plain_state_dict, write_safetensors
from lora_plugins.merge import DEFAULT_MAX_ERROR
from lora_plugins.tasks.argument_checks import check_path, check_size, instance_of
from lora_plugins.tasks.command_lines import ONNX, check_ending, check_runtime
from lora_plugins.tasks.data import INTERPOLATIONS, Size
from lora_plugins.tasks.errors import WeightsError
from lora_plugins.tasks.file_kinds import SAFETENSORS
from lora_plugins.tasks.inference.loading import load_task, merged_task
from lora_plugins.tasks.training import PROVENANCE_KEY, VisionTask, evaluated_on
from lora_plugins.utils import folder_beside, replace_file, take_permissions
from lora_plugins.writable import check_writable_file

CLASS_NAMES, INTERPOLATION, BATCH = "class_names", "interpolation", "batch"
TOLERANCE = 1e-4
"""Largest difference of a logit, relative to the largest logit: float32, with sums in another order."""
LARGEST_ONNX = 2**31 - 1
"""How many bytes protobuf writes, and so an ONNX file has, where the weights are not in files of their own."""

_CHECKS: Mapping[str, Check] = {
    "task": instance_of(VisionTask),
    "path": check_path,
    "size": optional(check_size),
}
"""What the arguments of `export_task` can be."""


class _ExportedNetwork(nn.Module):
    """The network of a task with plain layers only, from images in [0, 1] to logits, without the task."""

    mean: Tensor
    std: Tensor

    def __init__(self, task: VisionTask) -> None:
        super().__init__()
        self.network, self.bgr = task.network, task.bgr
        self.network_logits = task.network_logits
        self.register_buffer("mean", task.mean.clone())
        self.register_buffer("std", task.std.clone())

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes) or (N, classes, H, W) of images (N, channels, H, W)."""
        size = images.shape[-2:]
        if images.dtype != self.mean.dtype:  # or the program has a cast that does nothing
            images = images.to(self.mean.dtype)
        images = (images - self.mean) / self.std
        logits = self.network_logits(self.network, images.flip(1) if self.bgr else images)
        if logits.ndim == 4 and logits.shape[-2:] != size:
            logits = nn.functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        return logits


def export_task(task: VisionTask, path: str | Path, size: Size | None = None) -> float:
    """Exports a task with plain layers, in the format that the suffix of the file says.

    Args:
        task: The task, see `merged_task`.
        path: A `.pt2` file for `torch.export.load`, an `.onnx` file, or a `.safetensors` file of the weights alone,
            which `load_task` loads.
        size: Height and width of the images; by default the size that the task was trained with.

    Returns:
        The largest difference between the file's logits and the task's, relative to the largest logit.

    Raises:
        ConfigError: For another suffix, an unknown image size or one that the network does not take, a missing
            package, ONNX of a task in half precision or of 2 GiB, the file of the task's own weights, or a size for
            `.safetensors`.
        WeightsError: If the logits of the file differ from those of the task; it is not written then.
    """
    check_fields({"task": task, "path": path, "size": size}, _CHECKS)
    path = _checked(path)
    if path.exists() and path.resolve() == Path(task.model_config.weights).resolve():
        raise ConfigError(f"The file is {path}, which the task is read from: it would be replaced. Name a new file.")
    if size is not None and path.suffix == SAFETENSORS:
        raise ConfigError("size (--size) is that of a program's images, and a .safetensors file holds weights alone.")
    with evaluated_on(task, "cpu"):  # a program keeps the device that it is made on
        return _write_weights(task, path) if path.suffix == SAFETENSORS else _write_program(task, path, size)


def _write_program(task: VisionTask, path: Path, size: Size | None) -> float:
    size = size or task.image_size
    if size is None:
        raise ConfigError("The task does not say which size its images have. Give it: `size`, or --size HEIGHT WIDTH.")
    if path.suffix == ONNX and task.mean.itemsize < 4:  # onnxruntime lacks such operations, or rounds in other places
        raise ConfigError(f"The task is in {task.mean.dtype}, and ONNX files are in float32. Call task.float() first.")
    if path.suffix == ONNX and (size_of_weights := _bytes_of(task.network)) > LARGEST_ONNX:
        raise ConfigError(
            f"The weights take {size_of_weights / 2**30:.1f} GiB, and an ONNX file holds less than 2. Name a .pt2 file."
        )
    images = _test_images(len(task.mean), size)
    network = _ExportedNetwork(task).eval()
    with torch.no_grad():
        expected = _logits(network, images, task.image_size)
        shapes = {"images": {0: torch.export.Dim(BATCH, min=1)}}
        program = torch.export.export(network, (images,), dynamic_shapes=shapes)
        said = {CLASS_NAMES: json.dumps([*task.class_labels]), INTERPOLATION: _resizing(task)}
        written, exported = FORMATS[path.suffix](program, said)
        cases = ((images, expected), (images[:1], expected[:1]))  # two batch sizes
        scale = expected.abs().max()
        differences = [(exported(batch) - logits).abs().max() / scale for batch, logits in cases]
        difference = float(torch.stack(differences).max())  # NaN where one is, which Python's own max may pass over
    if not difference <= TOLERANCE:
        raise WeightsError(f"{path} answers differently: by {difference:.2e} of the largest logit. It is not written.")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, written)
    return difference


def main(given: Namespace) -> int:
    """Runs the command; returns the exit code.

    Raises:
        LoraError: As `export_task` and `merged_task` do.
    """
    _checked(given.out)
    max_error = DEFAULT_MAX_ERROR if given.max_error is None else given.max_error
    task = merged_task(given.model, given.weights, max_error=max_error)
    difference = export_task(task, given.out, given.size)
    print(f"{given.out}: logits as the task's, within {difference:.1e} of the largest")
    if Path(given.out).suffix != SAFETENSORS:
        shape = ", ".join(str(each) for each in (len(task.mean), *(given.size or task.image_size or ())))
        print(f"It takes images (N, {shape}) in [0, 1], resized ({_resizing(task)}), and normalizes them itself.")
    return 0


def _resizing(task: VisionTask) -> str:
    """Returns how the images of a task are resized, as torch says it: some names of timm stand for another."""
    return str(INTERPOLATIONS[task.interpolation].value)


def _checked(path: str | Path) -> Path:
    path = Path(path)
    check_ending(path)
    check_runtime(path)
    check_writable_file(path, "The file")
    return path


def _write_weights(task: VisionTask, path: Path) -> float:
    """Writes the plain state dict of the network, with its task and classes in the metadata, once it has been read."""
    tensors = plain_state_dict(task.network)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with folder_beside(path) as folder:
            written = folder / path.name
            write_safetensors(written, tensors, {PROVENANCE_KEY: task.provenance()})
            found = load_task(written).network.state_dict()
            wrong = [name for name, tensor in tensors.items() if not torch.equal(tensor, found[name].cpu())]
            if wrong:  # NaN is not equal to itself
                raise WeightsError(f"{listing(wrong)} would not load as it is. {path} is not written.")
            take_permissions(path, written)
            written.replace(path)
    except OSError as error:
        error.filename = str(path)  # and not the one in the temporary folder
        raise
    return 0.0


def _logits(network: nn.Module, images: Tensor, trained: Size | None) -> Tensor:
    size = (images.shape[-2], images.shape[-1])
    try:
        logits: Tensor = network(images)
    except (AssertionError, RuntimeError, ValueError) as error:
        if size == trained:
            raise
        usual = "" if trained is None else f" It was trained with {trained[0]}x{trained[1]}: leave `size` (--size) out."
        raise ConfigError(f"The network takes no images of {size[0]}x{size[1]}: {sentence(error)}{usual}") from error
    return logits


def _bytes_of(network: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))


def _test_images(channels: int, size: Size) -> Tensor:
    """Two images, one of noise and one that is smooth: on noise alone, a network may answer nothing."""
    generator = torch.Generator().manual_seed(0)
    smooth = nn.functional.interpolate(torch.rand(1, channels, 4, 4, generator=generator), size=size, mode="bilinear")
    return torch.cat([torch.rand(1, channels, *size, generator=generator), smooth])


def _to_pt2(program: ExportedProgram, said: Mapping[str, str]) -> "_Exported":
    file = io.BytesIO()
    torch.export.save(program, file, extra_files=dict(said))
    file.seek(0)
    return file.getvalue(), torch.export.load(file).module()


def _to_onnx(program: ExportedProgram, said: Mapping[str, str]) -> "_Exported":
    import onnxruntime

    named = {"images": {0: BATCH}}  # it is s34 otherwise, or another number
    made = torch.onnx.export(program, dynamo=True, output_names=["logits"], dynamic_shapes=named, verbose=False)
    if made is None:
        raise RuntimeError("torch.onnx.export made no program.")
    made.model.metadata_props.update(said)
    written = made.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(written, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return written, lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


_Exported = tuple[bytes, Callable[[Tensor], Tensor]]
"""The content of a file, and its network."""

_Write = Callable[[ExportedProgram, Mapping[str, str]], _Exported]
FORMATS: Mapping[str, _Write] = {".pt2": _to_pt2, ONNX: _to_onnx}
