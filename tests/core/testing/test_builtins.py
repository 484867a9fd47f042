"""The built-in layer types and inits pass the kit that third parties run on theirs."""

import gc

import pytest
import torch
from torch import nn

from lora_plugins import plugins as kinds
from lora_plugins.plugins import default_registry
from lora_plugins.testing import INIT_CHECKS, LAYER_CHECKS, check_init_plugin, check_layer_plugin
from lora_plugins.testing.required import IMMORTAL
from tests.core.libraries import Conv1D, Conv2dSame, DeformConv2d


def values(*shape):
    return lambda layer: torch.randn(*shape)


def words(layer):
    return torch.tensor([[0, 3, 3, 1], [6, 0, 2, 3]])


def sampled(layer):
    """An image, offsets of its places for two halves of its channels, and how much each place counts."""
    x = torch.randn(2, 4, 7, 8)
    places = torch.nn.functional.conv2d(x, torch.ones(1, 4, 3, 3), None, layer.stride, layer.padding, layer.dilation)
    return x, torch.randn(2, 2 * 2 * 9, *places.shape[2:]), torch.rand(2, 2 * 9, *places.shape[2:])


def attended(layer):
    return torch.randn(2, 3, 8), torch.randn(2, 5, layer.kdim), torch.randn(2, 5, layer.vdim)


def recurrent(kind=nn.LSTM, **options):
    return kind(5, 4, batch_first=True, **options)


def cell(kind=nn.LSTMCell, **options):
    return kind(5, 4, **options)


def state(layer):
    hidden = torch.randn(2, 4)
    return torch.randn(2, 5), (hidden, torch.randn(2, 4)) if isinstance(layer, nn.LSTMCell) else hidden


def of(cls, *sizes, **fixed):
    return lambda **options: cls(*sizes, **fixed, **options)


CONV = [
    {"groups": 2, "stride": 2, "padding": 1},
    {"dilation": 2, "padding": 2, "padding_mode": "reflect", "bias": False},
]
TRANSPOSED = [{"groups": 2, "stride": 2, "padding": 1, "output_padding": 1}, {"dilation": 2, "bias": False}]

LAYERS = {
    "linear": (of(nn.Linear, 6, 9), values(2, 3, 6), [{}, {"bias": False}]),
    "transformers_conv1d": (of(Conv1D, 9, 6), values(2, 3, 6), [{}]),
    "conv1d": (of(nn.Conv1d, 4, 8, 3), values(2, 4, 9), CONV),
    "conv2d": (of(nn.Conv2d, 4, 8, 3), values(2, 4, 7, 7), CONV),
    "timm_conv2d_same": (
        of(Conv2dSame, 4, 8, 3),
        values(2, 4, 7, 8),
        [{"stride": (2, 3)}, {"groups": 4, "dilation": 2}],
    ),
    "conv3d": (of(nn.Conv3d, 4, 8, 2), values(1, 4, 5, 5, 5), CONV[:1]),
    "conv_transpose1d": (of(nn.ConvTranspose1d, 4, 8, 3), values(2, 4, 5), TRANSPOSED),
    "conv_transpose2d": (of(nn.ConvTranspose2d, 4, 8, 3), values(2, 4, 4, 4), TRANSPOSED),
    "conv_transpose3d": (of(nn.ConvTranspose3d, 4, 8, 2), values(1, 4, 3, 3, 3), TRANSPOSED[:1]),
    "deform_conv2d": (
        of(DeformConv2d, 4, 8, 3),
        sampled,
        [{}, {"groups": 2, "stride": (1, 2), "padding": 1, "dilation": 2, "bias": False}],
    ),
    "embedding": (
        of(nn.Embedding, 7, 5),
        words,
        [{}, {"padding_idx": 3, "max_norm": 0.5}, {"scale_grad_by_freq": True}],
    ),
    "multihead_attention": (
        of(nn.MultiheadAttention, 8, 2, batch_first=True),
        attended,
        [{}, {"kdim": 6, "vdim": 10}, {"kdim": 6, "vdim": 10, "dropout": 0.1}],
    ),
    "recurrent": (
        recurrent,
        values(2, 3, 5),
        [
            {},
            {"num_layers": 2, "bidirectional": True, "proj_size": 3, "dropout": 0.5},
            {"bias": False, "num_layers": 2},
            {"kind": nn.GRU, "bidirectional": True},
            {"kind": nn.RNN, "nonlinearity": "relu"},
        ],
    ),
    "recurrent_cell": (
        cell,
        state,
        [{}, {"bias": False}, {"kind": nn.GRUCell}, {"kind": nn.RNNCell, "nonlinearity": "relu"}],
    ),
}

INITS = {
    "kaiming": [{}],
    "gaussian": [{}],
    "loftq": [{}, {"bits": 2, "iterations": 3}],
    "pissa": [{}, {"niter": 4}],
    "olora": [{}],
    "orthogonal": [{}],
    "eva": [{}, {"whiten": True}],
    "lora_ga": [{}, {"scale": "gd_scale", "direction": "random"}],
    "none": [{}],
}


def test_every_built_in_plugin_is_checked():
    registry = default_registry()
    ours = [info for info in registry.plugins if info.distribution == "lora-plugins"]
    assert set(LAYERS) == {name for info in ours for name in info.names(kinds.LAYERS)}
    assert set(INITS) == {name for info in ours for name in info.names(kinds.INITS)}


LONG = {
    "multihead_attention": {"compile", "dropout", "law", "mixed", "pure", "variant"},
    **{name: {"compile", "mixed", "pure"} for name in ("deform_conv2d", "recurrent", "recurrent_cell")},
    **{f"conv_transpose{n}d": {"compile", "dropout", "mixed", "pure", "variant"} for n in (1, 2, 3)},
    **{name: {"compile", "mixed", "pure"} for name in ("conv1d", "conv3d", "timm_conv2d_same", "transformers_conv1d")},
}
"""What takes long, by layer type, is in the slow tests; `linear` and `conv2d` have all checks in the fast ones."""


@pytest.mark.parametrize(
    ("name", "check"),
    [
        pytest.param(name, check, marks=pytest.mark.slow if check in LONG.get(name, ()) else ())
        for name in LAYERS
        for check in LAYER_CHECKS
    ],
)
def test_layer(name, check, device):
    build, inputs, options = LAYERS[name]
    plugin = default_registry().get(kinds.LAYERS, name)
    check_layer_plugin(plugin, build, inputs, options, only=[check], device=device)


@pytest.mark.parametrize("frozen", [False, True], ids=["searched", "frozen"])
def test_what_the_process_froze_stays_so(frozen):
    before = gc.get_freeze_count()
    gc.unfreeze()
    try:
        if frozen:
            gc.freeze()
        test_layer("linear", "pure", torch.device("cpu"))
        assert (gc.get_freeze_count() > IMMORTAL) == frozen
    finally:
        if before:
            gc.freeze()


@pytest.mark.parametrize("check", INIT_CHECKS)
@pytest.mark.parametrize("name", INITS)
def test_init(name, check):
    check_init_plugin(default_registry().get(kinds.INITS, name), INITS[name], only=[check])
