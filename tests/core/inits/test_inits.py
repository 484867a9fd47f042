"""How A and B start, and what LoftQ does to the base."""

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from lora_plugins import ConfigError, LoraConfig, LoraModel
from lora_plugins.utils import levels, quantize_dequantize
from tests.core.libraries import kstest

LAYERS = {
    "linear": lambda: nn.Linear(64, 96),
    "conv2d": lambda: nn.Conv2d(12, 96, 3, groups=2),
    "conv_transpose2d": lambda: nn.ConvTranspose2d(64, 48, 3),
    "embedding": lambda: nn.Embedding(64, 96),
}
layers = pytest.mark.parametrize("kind", LAYERS)


def adapted(kind: str, **fields) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": LAYERS[kind]()})
    LoraModel(model, LoraConfig(r=16, target_modules=["layer"], **fields))
    layer = model["layer"]
    return model, layer.lora_A["default"].detach(), layer.lora_B["default"].detach()


@layers
@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_starts_as_an_identity(kind, init):
    model, A, B = adapted(kind, init=init)
    zero, random = (A, B) if kind == "embedding" else (B, A)
    assert not zero.any()
    assert random.any()
    with LoraModel(model).disable_adapter():
        base = model["layer"].weight.clone()
    assert torch.equal(model["layer"].weight, base)


@layers
def test_kaiming_has_the_distribution_of_the_reference(kind):
    _, A, B = adapted(kind, init="kaiming")
    if kind == "embedding":  # microsoft/LoRA: nn.init.normal_(lora_B)
        assert kstest(B.flatten().numpy(), "norm").pvalue > 0.01
    else:  # nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
        bound = 1 / math.sqrt(A.shape[1])
        assert kstest(A.flatten().numpy(), "uniform", args=(-bound, 2 * bound)).pvalue > 0.01


@layers
def test_gaussian_has_a_deviation_of_one_over_r(kind):
    _, A, B = adapted(kind, init="gaussian")
    random = B if kind == "embedding" else A
    assert kstest(16 * random.flatten().numpy(), "norm").pvalue > 0.01


@layers
def test_none_draws_both_factors(kind):
    _, A, B = adapted(kind, init="none")
    for factor in (A, B):
        bound = 1 / math.sqrt(factor.shape[1])
        law = ("norm",) if kind == "embedding" else ("uniform", (-bound, 2 * bound))
        assert kstest(factor.flatten().numpy(), *law).pvalue > 0.01


class TestQuantizers:
    def test_nf4_levels_are_those_of_the_paper(self):
        published = [
            -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
            -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
            0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
        ]  # fmt: skip  # arXiv 2305.14314, appendix E
        # The published list was computed in float32 and is off by up to two units in the last place.
        torch.testing.assert_close(levels(4), torch.tensor(published, dtype=torch.float64), rtol=0, atol=2e-7)

    @pytest.mark.parametrize(("bits", "count"), [(2, 4), (4, 16), (8, 255)])
    def test_levels_have_a_zero_and_both_ends(self, bits, count):
        table = levels(bits)
        assert table.numel() == count
        assert {-1.0, 0.0, 1.0} <= set(table.tolist())
        assert (table.diff() > 0).all()

    @pytest.mark.parametrize("bits", [2, 4, 8])
    @pytest.mark.parametrize("shape", [(8, 64), (5, 7), (3, 4, 3, 3)], ids=str)
    def test_takes_the_nearest_level_of_each_block(self, bits, shape):
        weight = torch.randn(shape, dtype=torch.float64)
        got = quantize_dequantize(weight, bits, 16).flatten()
        for start in range(0, got.numel(), 16):
            block = weight.flatten()[start : start + 16]
            grid = levels(bits) * block.abs().max()
            nearest = grid[(block[:, None] - grid).abs().argmin(1)]
            torch.testing.assert_close(got[start : start + 16], nearest, rtol=0, atol=1e-15)

    def test_zero_stays_zero(self):
        assert not quantize_dequantize(torch.zeros(3, 5), 4, 4).any()


def loftq_by_the_paper(weight: Tensor, rank: int, scaling: float, bits: int, iterations: int) -> list[float]:
    """Algorithm 1 of arXiv 2310.08659, written from the paper: the error after each iteration."""
    update, errors = torch.zeros_like(weight), []
    for _ in range(iterations):
        quantized = quantize_dequantize(weight - update, bits, 64)
        U, S, V = torch.linalg.svd(weight - quantized)
        left = U[:, :rank] * S[:rank].sqrt() / math.sqrt(scaling)
        right = V[:rank].T * S[:rank].sqrt() / math.sqrt(scaling)
        update = scaling * left @ right.T
        errors.append(float(torch.linalg.matrix_norm(weight - quantized - update)))
    return errors


class TestLoftQ:
    def run(self, kind: str, r: int = 4, alpha: float = 8.0, **options) -> tuple[float, float, nn.Module]:
        torch.manual_seed(1)
        model = nn.ModuleDict({"layer": LAYERS[kind]().double()})
        weight = model["layer"].weight.detach().clone()
        LoraModel(model, LoraConfig(r=r, alpha=alpha, init="loftq", init_options=options))
        with torch.no_grad():
            error = float((model["layer"].weight - weight).norm())
        plain = quantize_dequantize(weight.flatten(1) if kind != "embedding" else weight.T, options.get("bits", 4), 64)
        reference = weight.flatten(1) if kind != "embedding" else weight.T
        return error, float((plain - reference).norm()), model

    @pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding"])
    @pytest.mark.parametrize("bits", [2, 4, 8])
    @pytest.mark.parametrize(("r", "alpha"), [(1, 1.0), (4, 16.0), (8, 2.0)], ids=str)
    def test_is_at_most_the_error_of_plain_quantization(self, kind, bits, r, alpha):
        error, plain, _ = self.run(kind, r, alpha, bits=bits)
        assert error <= plain * (1 + 1e-12)

    @pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding"])
    @pytest.mark.parametrize("bits", [2, 4])
    def test_never_rises_with_more_iterations(self, kind, bits):
        errors = [self.run(kind, bits=bits, iterations=count)[0] for count in (1, 2, 3, 5, 8)]
        assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(errors))

    @pytest.mark.parametrize("iterations", [1, 3, 5])
    @pytest.mark.parametrize("bits", [2, 4])
    def test_is_the_best_iterate_of_the_paper(self, bits, iterations):
        error, _, model = self.run("linear", bits=bits, iterations=iterations)
        with LoraModel(model).disable_adapter():
            weight = model["layer"].weight.detach().clone()
        expected = min(loftq_by_the_paper(weight, 4, 2.0, bits, iterations))
        assert error == pytest.approx(expected, rel=1e-9)

    def test_more_rank_than_the_layer_has(self):
        error, _, _ = self.run("linear", r=100)
        assert error < 1e-12

    @pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("iterations", [1, 4])
    def test_the_base_is_rebuilt_bit_for_bit(self, kind, dtype, iterations, tmp_path):
        base = nn.ModuleDict({"layer": LAYERS[kind]().to(dtype)})
        model = copy.deepcopy(base)
        lora = LoraModel(model, LoraConfig(init="loftq", init_options={"iterations": iterations, "bits": 2}))
        with torch.no_grad():
            model["layer"].lora_B["default"].add_(0.1)
        lora.save_adapter(tmp_path)
        fresh = copy.deepcopy(base)
        LoraModel.load_adapter(fresh, tmp_path)
        changed = model.state_dict()
        assert not torch.equal(changed["layer.weight"], base["layer"].weight)
        assert all(torch.equal(value, changed[key]) for key, value in fresh.state_dict().items())
        LoraModel(fresh).unload()
        assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in base.state_dict().items())

    def test_disabling_gives_the_unquantized_base(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 8))
        x = torch.randn(3, 64)
        expected = model(x)
        lora = LoraModel(model, LoraConfig(init="loftq"))
        assert not torch.equal(model(x), expected)
        with lora.disable_adapter():
            assert torch.equal(model(x), expected)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"bits": 3}, r"loftq has \(2, 4, 8\) bits"),
            ({"bits": 4.0}, "bits of loftq is a whole number"),
            ({"block_size": True}, "block_size of loftq is a whole number"),
            ({"iterations": 0}, "iterations of loftq is a whole number"),
            ({"bit": 4}, "Did you mean 'bits'"),
        ],
        ids=["bits", "no integer", "a flag", "iterations", "unknown"],
    )
    def test_refuses_bad_options(self, options, message):
        with pytest.raises(ConfigError, match=message):
            LoraModel(nn.Sequential(nn.Linear(4, 4)), LoraConfig(init="loftq", init_options=options))
