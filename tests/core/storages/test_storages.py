"""What the built-in storages keep of a weight: the levels of LoftQ's quantizers, in few bytes."""

import pytest
import torch
from torch import nn

from lora_plugins import ConfigError, LoraConfig, LoraModel
from lora_plugins.plugins import storage_options
from lora_plugins.storages.int8 import Int8Storage
from lora_plugins.storages.nf4 import NF4Storage
from lora_plugins.utils import quantize_dequantize

STORAGES = {4: NF4Storage(), 8: Int8Storage()}
bits = pytest.mark.parametrize("bits", STORAGES)


def dense(plugin, weight, **given):
    options = storage_options(plugin, given)
    return plugin.restore(plugin.store(weight, options), weight.shape, options)


def stored_bytes(plugin, weight, **given):
    tensors = plugin.store(weight, storage_options(plugin, given)).values()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@bits
@pytest.mark.parametrize("block_size", [2, 64, 4096])
@pytest.mark.parametrize("shape", [(96, 64), (7, 5, 3, 3)], ids=str)
def test_the_values_are_those_of_loftqs_quantizer(bits, block_size, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    got = dense(STORAGES[bits], weight, block_size=block_size, double_quant=False)
    expected = quantize_dequantize(weight, bits, block_size)
    if bits == 4:
        assert torch.equal(got, expected)
    else:  # the same code, multiplied with a scale that is rounded once more: one unit in the last place
        torch.testing.assert_close(got, expected, rtol=2 * torch.finfo(torch.float32).eps, atol=0)


@bits
def test_scales_in_8_bits_cost_next_to_nothing(bits):
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    errors = {double: (dense(STORAGES[bits], weight, double_quant=double) - weight).norm() for double in (False, True)}
    # Each scale is off by at most half a step of its square root in 255: 0.4 % at the largest scale of a group. That is
    # little beside 4 bits, and as much as half a step of 8 bits, which is 1 in 254.
    assert errors[True] < {4: 1.001, 8: 1.2}[bits] * errors[False]


@bits
@pytest.mark.parametrize(("blocks", "groups"), [(1, 1), (256, 1), (257, 2)])
def test_256_scales_share_a_number(bits, blocks, groups):
    plugin = STORAGES[bits]
    stored = plugin.store(torch.ones(blocks, 64), storage_options(plugin, {}))
    assert {name: len(stored[name]) for name in ("scale_codes", "scale_maxima")} == {
        "scale_codes": blocks,
        "scale_maxima": groups,
    }


@bits
def test_the_largest_value_of_a_group_is_kept(bits):
    """Its scale has the last code, and it has the last level."""
    weight = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    found, largest = (each.view(2, -1).abs().amax(1) for each in (dense(STORAGES[bits], weight), weight))
    torch.testing.assert_close(found, largest, rtol=2 * torch.finfo(torch.float32).eps, atol=0)


def test_a_block_beside_one_with_large_values_keeps_its_own():
    weight = torch.full((128,), 1e-3)
    weight[64:] = 1e3
    assert dense(NF4Storage(), weight)[:64].abs().min() > 0


@pytest.mark.parametrize(
    ("plugin", "options", "most"),
    [
        (NF4Storage(), {}, 0.135),
        (NF4Storage(), {"double_quant": False}, 0.141),
        (Int8Storage(), {}, 0.255),
        (Int8Storage(), {"double_quant": False}, 0.266),
    ],
    ids=["nf4", "nf4-single", "int8", "int8-single"],
)
def test_bytes_as_a_share_of_float32(plugin, options, most):
    assert stored_bytes(plugin, torch.randn(384, 384), **options) <= most * 4 * 384 * 384


@pytest.mark.parametrize("storage", ["nf4", "int8"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean:torch.jit.TracerWarning")  # shapes
def test_jit_trace(storage):
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    LoraModel(model, LoraConfig(r=2, init="none", quantize=storage, quantize_options={"min_size": 0}))
    x = torch.randn(3, 8)
    traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(2 * x), model(2 * x))


class Looks(nn.Module):
    """Looks up in a table and multiplies: both ways in which stored values are read."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.linear = nn.Linear(8, 4)

    def forward(self, x):
        return self.linear(self.table(x))


@pytest.mark.parametrize("storage", ["nf4", "int8"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what the exporter imports
def test_onnx(storage, tmp_path):
    runtime, _ = pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    model = Looks().eval()
    LoraModel(model, LoraConfig(r=2, init="none", quantize=storage, quantize_options={"min_size": 0}))
    x = torch.tensor([[0, 3, 9], [7, 7, 1]])
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(x).detach(), rtol=1e-5, atol=1e-6)


def test_the_values_and_bytes_are_those_of_bitsandbytes():
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    functional = pytest.importorskip("bitsandbytes.functional")
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    stored = NF4Storage().store(weight, storage_options(NF4Storage(), {"double_quant": False}))
    assert torch.equal(stored["scales"], state.absmax)
    # Values that lie between two levels may fall on either side, since its levels are rounded otherwise (1.5e-8).
    assert (stored["codes"] != codes.flatten()).sum() <= 1


@pytest.mark.parametrize(
    ("plugin", "given", "message"),
    [
        (NF4Storage(), {"blocksize": 64}, r"'nf4' has no option 'blocksize'.*block_size"),
        (NF4Storage(), {"block_size": 3}, "block_size of nf4 is an even count up to 4096, not 3"),
        (Int8Storage(), {"block_size": True}, "block_size of int8 is an even count up to 4096, not True"),
        (Int8Storage(), {"double_quant": 1}, "double_quant of int8 is True or False, not 1"),
        (NF4Storage(), {"min_size": -1}, "min_size is a number of elements, not -1"),
        (NF4Storage(), {"min_size": True}, "min_size is a number of elements, not True"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_are_checked(plugin, given, message):
    with pytest.raises(ConfigError, match=message):
        storage_options(plugin, given)
