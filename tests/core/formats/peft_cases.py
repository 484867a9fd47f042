"""Models with all that PEFT adapts, and adapters of PEFT and of ours on them."""

import copy
import json
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_plugins import AdapterFileError, LoraConfig, LoraModel
from tests.core.libraries import Conv1D

TOLERANCE = 1e-9
"""Of float64 outputs of a size around 1."""


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x)
        return self.last(self.mha(x, x, x)[0])


class Mixed(nn.Module):
    """Attentions before and behind layers that change PEFT's `fan_in_fan_out`."""

    def __init__(self):
        super().__init__()
        self.first = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mixer = Conv1D(8, 8)
        self.second = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, 8)
        self.third = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.mixer(self.first(x, x, x)[0])
        x = self.fc(self.second(x, x, x)[0])
        return self.third(x, x, x)[0]


class Convolutions(nn.Module):
    """Names of which one is the end of another: `conv1` and `block.conv1`."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, stride=2)
        self.block = nn.ModuleDict({"conv1": nn.Conv2d(4, 4, 3, padding="same", bias=False), "bn": nn.BatchNorm2d(4)})
        self.volume = nn.Conv3d(1, 2, 3, padding=1)
        self.line = nn.Conv1d(8, 5, 3)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = self.block["bn"](self.block["conv1"](self.conv1(x)))
        x = self.volume(x[:, None]).flatten(1, 2).flatten(2)
        return self.head(self.line(x).mean(-1))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(7, 6, padding_idx=0)
        self.mixer = Conv1D(5, 6)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.mixer(self.words(x)).mean(1))


class Repeated(nn.Module):
    """The same names at several depths."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.inner = nn.ModuleDict({"fc": nn.Linear(6, 6), "more": nn.ModuleDict({"fc": nn.Linear(6, 3)})})

    def forward(self, x):
        return self.inner["more"]["fc"](self.inner["fc"](self.fc(x).tanh()).tanh())


class Numbered(nn.Module):
    """Blocks that are counted in two containers."""

    def __init__(self):
        super().__init__()
        self.net = nn.ModuleDict(
            {name: nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(6, 6)}) for _ in range(2)) for name in ("down", "up")}
        )

    def forward(self, x):
        for block in (*self.net["down"], *self.net["up"]):
            x = block["fc"](x).tanh()
        return x


class Staged(nn.Module):
    """Blocks that are counted in stages, which are counted as well."""

    def __init__(self):
        super().__init__()
        stages = (nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(6, 6)}) for _ in range(2)) for _ in range(2))
        self.net = nn.ModuleDict({"stages": nn.ModuleList(stages)})

    def forward(self, x):
        for stage in self.net["stages"]:
            for block in stage:
                x = block["fc"](x).tanh()
        return x


class Listed(nn.Module):
    """A layer that is called from a plain list, as in the mask heads of Mask2Former."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.layers = [self.first, nn.Tanh()]

    def forward(self, x):
        return self.layers[1](self.layers[0](x))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first

    def forward(self, x):
        return self.again(torch.tanh(self.first(x)))


class Lookalikes(nn.Module):
    """Names that PEFT gives to modules of its own, and names that end with the letters of another one."""

    def __init__(self):
        super().__init__()
        self.base_layer = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        self.lora_stem = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.layer_norm = nn.BatchNorm1d(6)
        self.head = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 3)))

    def forward(self, x):
        return self.head(self.layer_norm(self.norm(self.lora_stem(self.base_layer(x).tanh()))))


INPUTS = {
    Attention: lambda: torch.randn(2, 5, 8),
    Mixed: lambda: torch.randn(2, 5, 8),
    Convolutions: lambda: torch.randn(2, 3, 8, 8),
    Words: lambda: torch.randint(0, 7, (2, 4)),
    Repeated: lambda: torch.randn(4, 6),
    Numbered: lambda: torch.randn(4, 6),
    Staged: lambda: torch.randn(4, 6),
    Lookalikes: lambda: torch.randn(4, 6),
}


@dataclass(frozen=True)
class Case:
    """One adapter, as PEFT says it and as we do.

    Args:
        id: Name of the case.
        model: The model.
        peft: Fields of PEFT's config.
        ours: Fields of ours.
        dtype: Type of the model.
    """

    id: str
    model: type[nn.Module]
    peft: dict[str, Any] = field(default_factory=dict)
    ours: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64

    def build(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            model = self.model().to(self.dtype).eval()
            for name, buffer in model.named_buffers():
                if "running" in name:
                    buffer.uniform_(0.5, 1.5)
        return model

    def output(self, model):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(8)
            x = INPUTS[self.model]()
            return model(x.to(self.dtype) if x.is_floating_point() else x)


ALL_CONV = ["conv1", "block.conv1", "volume", "line"]
CASES = [
    Case("linear", Repeated, {"target_modules": ["fc"]}, {"target_modules": ["fc"]}),
    Case("one of several", Repeated, {"target_modules": "inner.fc"}, {"target_modules": r"inner\.fc"}),
    Case(
        "patterns",
        Repeated,
        {"target_modules": ["fc"], "rank_pattern": {"inner.fc": 4, "fc": 3}, "alpha_pattern": {"^fc": 5, "more.fc": 7}},
        {"target_modules": ["fc"], "rank_pattern": {"inner.fc": 4, "^fc": 3}, "alpha_pattern": {"more.fc": 7}},
    ),
    Case(
        "a pattern of the outermost",
        Repeated,
        {"target_modules": ["fc"], "alpha_pattern": {"^fc": 5}},
        {"target_modules": ["fc"], "alpha_pattern": {"^fc": 5.0}},
    ),
    Case(
        "a rank of the outermost",
        Repeated,
        {"target_modules": ["fc"], "rank_pattern": {"^fc": 3}},
        {"target_modules": ["fc"], "rank_pattern": {"^fc": 3}},
    ),
    Case("rslora", Repeated, {"target_modules": ["fc"], "use_rslora": True}, {"use_rslora": True}),
    Case("convolutions", Convolutions, {"target_modules": ALL_CONV}, {"target_modules": ALL_CONV}),
    Case("embedding and Conv1D", Words, {"target_modules": ["words", "mixer"]}, {"target_modules": ["words", "mixer"]}),
    Case("attention", Attention, {"target_modules": ["mha", "last"]}, {"target_modules": ["mha", "out_proj", "last"]}),
    Case("attention without out_proj", Attention, {"target_modules": ["mha"]}, {"target_modules": ["mha"]}),
    Case("out_proj", Attention, {"target_modules": ["mha"]}, {"target_modules": ["out_proj"]}),
    Case(
        "attention of two ranks",
        Attention,
        {"target_modules": ["mha"]},
        {"target_modules": ["mha", "out_proj"], "rank_pattern": {"out_proj": 5}, "alpha_pattern": {"out_proj": 2}},
    ),
    Case("attention and its output projection by name", Attention, {"target_modules": ["mha", "out_proj", "last"]}),
    Case(
        "attention behind Conv1D, transposed",
        Mixed,
        {"target_modules": ["mixer", "second"]},
        {"target_modules": ["mixer", "second", "out_proj"], "exclude_modules": ["first.out_proj", "third.out_proj"]},
    ),
    Case(
        "attention behind Conv1D and Linear",
        Mixed,
        {"target_modules": ["first", "mixer", "second", "fc", "third"]},
        {"target_modules": "all"},
    ),
    Case("attention of fan_in_fan_out", Attention, {"target_modules": ["mha"], "fan_in_fan_out": True}),
    Case(
        "parts",
        Attention,
        {"target_modules": ["mha"]},
        {"target_modules": ["mha"], "fused_parts": {"mha": ["q", "v"]}},
    ),
    Case("dora", Repeated, {"target_modules": ["fc"], "use_dora": True}, {"variant": "dora"}),
    Case(
        "dora of embedding and Conv1D",
        Words,
        {"target_modules": ["words", "mixer"], "use_dora": True},
        {"target_modules": ["words", "mixer"], "variant": "dora"},
    ),
    Case(
        "dora of convolutions",
        Convolutions,
        {"target_modules": ALL_CONV, "use_dora": True},
        {"target_modules": ALL_CONV, "variant": "dora"},
    ),
    Case(
        "biases",
        Convolutions,
        {"target_modules": ["conv1"], "bias": "all"},
        {"bias": "all", "exclude_modules": ["volume"]},
    ),
    Case(
        "biases of adapted layers",
        Attention,
        {"target_modules": ["first", "mha"], "bias": "lora_only"},
        {"target_modules": ["first", "mha", "out_proj"], "bias": "lora_only"},
    ),
    Case(
        "all biases of attention",
        Attention,
        {"target_modules": ["first", "mha"], "bias": "all"},
        {"target_modules": ["first", "mha", "out_proj"], "bias": "all"},
    ),
    Case(
        "heads with statistics",
        Convolutions,
        {"target_modules": ["conv1", "line"], "modules_to_save": ["bn", "head"], "bias": "all"},
        {"target_modules": ["conv1", "line"], "modules_to_save": ["bn", "head"]},
    ),
    Case(
        "names like PEFT's",
        Lookalikes,
        {"target_modules": ["base_layer.0"], "modules_to_save": ["norm", "lora_stem"], "bias": "lora_only"},
        {"target_modules": ["base_layer.0"], "modules_to_save": ["norm", "lora_stem"], "bias": "lora_only"},
    ),
    Case(
        "adapted, with names like PEFT's",
        Lookalikes,
        {"target_modules": ["base_layer.1", "lora_stem"], "bias": "all"},
        {"target_modules": ["base_layer.1", "lora_stem"], "bias": "all"},
    ),
    Case(
        "all biases, and those inside a head",
        Lookalikes,
        {"target_modules": ["lora_stem"], "modules_to_save": ["head"], "bias": "all"},
        {"target_modules": ["lora_stem"], "modules_to_save": ["head"], "bias": "all"},
    ),
    Case(
        "tracked statistics",
        Convolutions,
        {"target_modules": ["conv1"], "modules_to_save": ["bn"]},
        {"target_modules": ["conv1"], "norm": "track"},
    ),
    Case(
        "blocks", Repeated, {"target_modules": ["fc"], "exclude_modules": ["more.fc"]}, {"exclude_modules": ["more.fc"]}
    ),
    Case(
        "blocks by number",
        Numbered,
        {"target_modules": ["fc"], "layers_to_transform": [1]},
        {"target_modules": ["fc"], "layers_to_transform": [1], "layers_pattern": ["down", "up"]},
    ),
    Case(
        "blocks by number in one container",
        Numbered,
        {"target_modules": ["fc"], "layers_to_transform": 0, "layers_pattern": "up"},
        {"target_modules": ["fc"], "layers_to_transform": 0, "layers_pattern": "up"},
    ),
    Case(
        "parameters",
        Repeated,
        {
            "target_parameters": ["inner.fc.weight"],
            "target_modules": ["more.fc"],
            "alpha_pattern": {"inner.fc.weight": 9},
            "rank_pattern": {"inner.fc.weight": 4},
        },
    ),
]
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def moved(model):
    """Moves everything that training would, and statistics of modules that are saved."""
    with torch.no_grad():
        torch.manual_seed(9)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def with_peft(case, **fields):
    """The case's model with PEFT's adapter."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 3, **case.peft, **fields})
    model = moved(peft.get_peft_model(case.build(), config)).eval()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "modules_to_save" in name and "running" in name:
                buffer.add_(0.25)
    return model


def with_ours(case, **fields):
    """The case's model with our adapter."""
    model = case.build()
    lora = LoraModel(model, LoraConfig(**{"r": 2, "alpha": 3.0, **case.ours, **fields}))
    moved(model)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "running" in name and name in lora.plans["default"].saved_buffers:
                buffer.add_(0.25)
    return lora


def read_by_peft(case, folder):
    """The case's model with the adapter of a folder, as PEFT reads it."""
    peft = pytest.importorskip("peft")
    return peft.PeftModel.from_pretrained(case.build(), str(folder)).eval()


def difference(case, first, second):
    return float((case.output(first) - case.output(second)).abs().max())


def effect(case, model):
    """How much an adapter changes the output: what a test of it has to be far above."""
    return difference(case, model, copy.deepcopy(case.build()))


CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
BY_ID = {case.id: case for case in CASES}
LINEAR, ATTENTION = BY_ID["linear"], BY_ID["attention"]
SINGLE = replace(LINEAR, dtype=torch.float32)
"""For starts that PEFT computes in single precision, and refuses on a base in double."""


def edit_config(folder, **fields):
    """Changes fields of a config; None takes one out."""
    content = {**json.loads((folder / CONFIG).read_text()), **fields}
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_tensors(folder, change):
    """Lets a function change the tensors of a file by key."""
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS, {"format": "pt"})


def read_exactly(case, folder, expected):
    """Checks that a model of the case, with the adapter of a folder, computes what another one does; returns it."""
    model = case.build()
    LoraModel.load_adapter(model, folder)
    assert difference(case, model, expected) <= TOLERANCE
    return model


def refused(case, folder, untouched, match, **options):
    """Checks that reading a folder into a model of the case is refused, and leaves it untouched."""
    model = case.build()
    with untouched(model), pytest.raises(AdapterFileError, match=match):
        LoraModel.load_adapter(model, folder, **options)
