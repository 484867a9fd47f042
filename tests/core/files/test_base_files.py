"""A base that is stored while it is read, so that the float model is never in memory."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from torch import nn

from lora_plugins import ConfigError, LoraConfig, LoraModel, MergeError, TargetError, load_quantized
from lora_plugins.inplace import StoredWeight


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 32)
        self.norm = nn.BatchNorm1d(32)
        self.fc = nn.Linear(32, 48)
        self.out = nn.Linear(48, 32)
        self.head = nn.Linear(32, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, index):
        x = self.norm(self.embed(index).mT).mT
        return self.head(self.out(torch.tanh(self.fc(x))))


SMALL = {"min_size": 0}
CONFIG = LoraConfig(r=2, target_modules=["fc", "out"], quantize="nf4", quantize_options=SMALL)
INDEX = torch.tensor([[0, 3, 5]])


def floating(dtype=torch.float32):
    torch.manual_seed(0)
    return Net().to(dtype).eval()


def empty(dtype=torch.float32):
    with torch.device("meta"):
        return Net().to(dtype).eval()


def written(folder, parts=1, model=None):
    model = model or floating()
    state = {key: value for key, value in model.state_dict().items() if key != "head.weight"}
    if parts <= 1:
        safetensors.torch.save_file(state, folder / "model.safetensors")
        return folder / "model.safetensors" if parts else folder
    keys = list(state)
    names = {key: f"model-{at % parts}.safetensors" for at, key in enumerate(keys)}
    for name in set(names.values()):
        safetensors.torch.save_file({key: state[key] for key in keys if names[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parts", [0, 1, 3], ids=["folder", "file", "index"])
@pytest.mark.parametrize("fields", [{}, {"quantize_modules": "all"}, {"quantize": "int8"}], ids=str)
def test_the_same_bits_as_of_the_float_model(parts, fields, dtype, tmp_path):
    config = LoraConfig(**{**CONFIG.to_dict(), **fields})
    model = load_quantized(empty(dtype), written(tmp_path, parts), config)
    other = floating(dtype)
    for each in (model, other):
        torch.manual_seed(1)
        LoraModel(each, config)
    first, second = model.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert [key for key, value in second.items() if not torch.equal(first[key], value)] == []
    assert torch.equal(model(INDEX), other(INDEX))
    if "quantize_modules" in fields:
        assert model.head.weight_stored is model.embed.weight_stored
    else:
        assert model.head.weight is model.embed.weight
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora" in name)
    model(INDEX).sum().backward()


def test_an_adapter_loads_onto_it(tmp_path):
    lora = LoraModel(floating(), CONFIG)
    lora.save_adapter(tmp_path / "adapter")
    model = load_quantized(empty(), written(tmp_path), CONFIG)
    assert isinstance(model.fc.weight_stored, StoredWeight)
    LoraModel.load_adapter(model, tmp_path / "adapter")
    assert torch.equal(model(INDEX), lora.model(INDEX))


def test_what_does_not_fit_is_refused_before_anything_is_touched(tmp_path):
    path = written(tmp_path)
    state = safetensors.torch.load_file(path)

    def refused(message, change=None, config=CONFIG, model=None, file=None):
        model = model or empty()
        if change is not None:
            damaged = dict(state)
            change(damaged)
            file = tmp_path / "damaged.safetensors"
            safetensors.torch.save_file(damaged, file)
        with pytest.raises(ConfigError, match=message):
            load_quantized(model, file or path, config)
        assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))

    refused(r"1 tensor only in the model \('fc.weight'\), 0 only in the file", lambda s: s.pop("fc.weight"))
    refused(
        r"0 tensors only in the model \(none\), 1 only in the file \('more'\)", lambda s: s.update(more=torch.ones(1))
    )
    refused(r"'fc.weight' is \[48, 31\] .* and \[48, 32\]", lambda s: s.update({"fc.weight": torch.zeros(48, 31)}))
    refused("it has no quantize", config=LoraConfig(target_modules=["fc"]))
    refused("is not there", file=tmp_path / "nothing.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 100)
    refused("cannot be read as safetensors", file=tmp_path / "broken.safetensors")
    with pytest.raises(MergeError, match=r"'embed.weight' is the same tensor as 'head.weight'"):
        load_quantized(empty(), path, LoraConfig(target_modules=["embed"], quantize="nf4", quantize_options=SMALL))
    refused("'fc.weight' has values that are not finite, .* as nf4", lambda s: s["fc.weight"].fill_(float("nan")))
    index = {"weight_map": dict.fromkeys(state, "lost.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused("lost.safetensors cannot be read as safetensors", file=tmp_path)
    (tmp_path / "index.json").write_text("{}")
    refused("index.json cannot be read as an index of safetensors files: KeyError", file=tmp_path / "index.json")
    (tmp_path / "lost.safetensors").write_bytes(path.read_bytes())
    index["weight_map"] |= {"fc.weight": "other.safetensors"}
    safetensors.torch.save_file({"fc.bias": state["fc.bias"]}, tmp_path / "other.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused("other.safetensors cannot be read as safetensors: .*fc.weight", file=tmp_path)
    model = empty()
    model.register_buffer("positions", torch.zeros(3, device="meta"), persistent=False)
    refused("'positions' is on the meta device and in no state dict", model=model)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_model_that_is_loaded_already_is_refused(tmp_path, quantize, untouched):
    path = written(tmp_path)
    model = load_quantized(empty(), path, CONFIG)
    said = r"stored already: 'fc.weight', 'out.weight'\. .* meta device again"
    with untouched(model), pytest.raises(ConfigError, match=said):
        load_quantized(model, path, replace(CONFIG, quantize=quantize))


@pytest.mark.parametrize("fields", [{}, {"quantize_modules": ["late"]}], ids=["beside", "stored"])
def test_a_layer_without_a_shape_is_refused(tmp_path, fields):
    model, path = empty(), written(tmp_path)
    model.late = nn.LazyLinear(4, device="meta")
    with pytest.raises(TargetError, match=r"'late\.weight', 'late\.bias' has no shape yet\. Run the model once"):
        load_quantized(model, path, replace(CONFIG, **fields))


def test_what_is_loaded_does_not_follow_its_file(tmp_path):
    path = written(tmp_path)
    model = load_quantized(empty(), path, CONFIG)
    expected = model(INDEX)
    with path.open("r+b") as file:  # in place: another file of that name would leave the old one mapped
        start = 8 + int.from_bytes(file.read(8), "little")
        file.seek(start)
        file.write(bytes(path.stat().st_size - start))
    assert torch.equal(model(INDEX), expected)


def test_buffers_that_are_one_stay_one(tmp_path):
    def tied(model):
        model.other = nn.BatchNorm1d(32)
        model.other.running_mean = model.norm.running_mean
        return model

    path = tmp_path / "model.safetensors"
    safetensors.torch.save_model(tied(floating()), path)
    model = load_quantized(tied(empty()), path, CONFIG)
    assert model.other.running_mean is model.norm.running_mean
    assert not model.norm.running_mean.is_meta


PROGRAM = """
import sys, torch
from torch import nn
from lora_plugins import LoraConfig, LoraModel, load_quantized
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
def empty(layers, width):
    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
config = LoraConfig(r=2, quantize="nf4")
load_quantized(empty(1, 1024), sys.argv[1], config)
before = peak()
load_quantized(empty(int(sys.argv[3]), int(sys.argv[4])), sys.argv[2], config)
print(peak() - before)
"""


@pytest.mark.slow  # the peak of a process is the system's to say: beside other tests it was twice as high
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize(
    ("layers", "width", "most"),
    [
        pytest.param(40, 1024, 21 + 16, id="many layers"),  # 160 MiB, stored 21
        pytest.param(1, 4096, 9 + 64 + 32, id="a large one"),  # 64 MiB: there is no second copy of it
    ],
)
def test_memory_peaks_at_the_stored_size_and_one_layer(layers, width, most, tmp_path):
    for name, count, size in (("one", 1, 1024), ("all", layers, width)):
        model = nn.Sequential(*(nn.Linear(size, size) for _ in range(count)))
        safetensors.torch.save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    arguments = [str(tmp_path / "one.safetensors"), str(tmp_path / "all.safetensors"), str(layers), str(width)]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True)
    assert int(done.stdout) / 1024 < most, done.stdout
