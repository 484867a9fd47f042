"""Hostile files: nothing is allocated that a file does not have, and each is refused by the same error."""

import json
import struct
import tracemalloc

import pytest
from safetensors.torch import load
from torch import nn

from lora_plugins import AdapterFileError, ConfigError, LoraConfig, LoraModel
from lora_plugins.formats.tensor_file import read_json, read_shapes, read_tensors
from lora_plugins.plugins import FORMATS, default_registry

MEBIBYTE = 1 << 20


def with_header(content, size=None, data=b""):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def entry(shape, offsets, dtype="F32"):
    return {"lora_unet_0.alpha": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


HOSTILE = {
    "empty": b"",
    "a few bytes": b"\x08\x00\x00",
    "no header": struct.pack("<Q", 0),
    "a header longer than the file": with_header({}, size=1 << 60),
    "a header of 100 megabytes": with_header({}, size=100 * MEBIBYTE),
    "no JSON": with_header(b"{broken"),
    "a list": with_header([1, 2]),
    "deep JSON": with_header(b"[" * 10_000),
    "no text": with_header(b"\xff\xfe\xfd\xfc"),
    "entries that are none": with_header({"lora_unet_0.alpha": 3}),
    "an index of 100 gigabytes": with_header(entry([25 << 30], [0, 100 << 30])),
    "more than there is": with_header(entry([2], [0, 8]), data=b"1234"),
    "offsets that run backwards": with_header(entry([1], [4, 0]), data=b"1234"),
    "a negative shape": with_header(entry([-1], [0, 4]), data=b"1234"),
    "a shape of another size": with_header(entry([3], [0, 4]), data=b"1234"),
    "a type that is none": with_header(entry([1], [0, 4], "X99"), data=b"1234"),
    "a pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x8c\x06system\x94\x93\x94.",
}
hostile = pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)


@hostile
def test_tensors_are_refused(content, tmp_path):
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(AdapterFileError, match=r"adapter\.safetensors"):
        read_tensors(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MEBIBYTE


@hostile
@pytest.mark.parametrize("name", ["peft", "diffusers", "kohya", None])
def test_no_format_trips_over_them(content, name, tmp_path, untouched):
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(content)
    model = nn.Sequential(nn.Linear(2, 2))
    for owned in default_registry().of(FORMATS).values():
        owned.plugin.recognizes(path)
    with untouched(model), pytest.raises(AdapterFileError):
        LoraModel.load_adapter(model, path, format=name)


def test_a_header_of_100_megabytes_that_is_there(tmp_path):
    path = tmp_path / "adapter.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100 * MEBIBYTE))
        file.truncate(101 * MEBIBYTE)  # sparse
    tracemalloc.start()
    with pytest.raises(AdapterFileError, match="its header would have 104,857,600 bytes"):
        read_tensors(path)
    assert read_shapes(path) == {}
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MEBIBYTE


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"{", b"\xff\xfe", b"[" * 100_000], ids=range(6))
def test_json_is_refused(content, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(AdapterFileError, match=r"config\.json"):
        read_json(path)


def test_what_is_not_there_or_a_folder(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        for read in (read_json, read_tensors):
            with pytest.raises(AdapterFileError, match="cannot be read"):
                read(path)


@pytest.mark.parametrize(
    ("format", "name", "match"),
    [
        pytest.param("diffusers", "notes.txt", r"notes\.txt is a file\. Name another place", id="file for a folder"),
        pytest.param("diffusers", "folder.safetensors", "which is a folder. Name a file", id="folder of diffusers"),
        pytest.param("kohya", "folder.safetensors", "which is a folder. Name a file", id="folder of kohya"),
    ],
)
def test_a_place_that_something_else_has_is_said(format, name, match, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "folder.safetensors").mkdir()
    lora = LoraModel(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2))
    with pytest.raises(ConfigError, match=match):
        lora.save_adapter(tmp_path / name, format=format, format_options={"component": "unet"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.safetensors", "notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_a_file_has_the_same_bytes_each_time(format, tmp_path):
    lora = LoraModel(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2))
    for name in "abcdef":
        lora.save_adapter(tmp_path / f"{name}.safetensors", format=format, format_options={"component": "unet"})
    first, *others = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    assert others == [first] * 5
    assert (8 + int.from_bytes(first[:8], "little")) % 8 == 0
    assert [*load(first)]
    metadata = [*json.loads(first[8 : 8 + int.from_bytes(first[:8], "little")])["__metadata__"]]
    assert len(metadata) > 1
    assert metadata == sorted(metadata)
