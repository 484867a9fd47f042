"""EVA and LoRA-GA: what PEFT makes of the same model, data and seed; ranks that move; loading without data."""

import copy
import json
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_plugins import ConfigError, InitData, InitPlugin, LoraConfig, LoraModel, PluginError, TargetError
from tests.core.registries import registry_of


class Mlp(nn.Module):
    """Three linear layers of different widths; the larger `wave`, the more directions do the last one's inputs have."""

    def __init__(self, wave: float = 8.0):
        super().__init__()
        self.wave = wave
        self.first, self.second, self.third = nn.Linear(20, 30), nn.Linear(30, 24), nn.Linear(24, 16)

    def forward(self, x):
        return self.third((self.wave * self.second(self.first(x).relu())).sin())


class Vision(nn.Module):
    """A layer of every type that has inputs or gradients."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.up(self.conv(x).relu()).flatten(2).mT
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


FACTORS = 64  # between the largest and the smallest spread of an input


def mlp(wave: float = 8.0) -> Mlp:
    torch.manual_seed(0)
    return Mlp(wave)


def batches(count: int = 1, size: int = 64):
    generator = torch.Generator().manual_seed(2)
    spread = torch.logspace(0, -math.log10(FACTORS), 20)
    return [
        (torch.randn(size, 20, generator=generator) * spread, torch.randint(0, 16, (size,), generator=generator))
        for _ in range(count)
    ]


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


EVA = LoraConfig(r=3, alpha=6.0, target_modules=["first", "second", "third"], init="eva")
LORA_GA = LoraConfig(r=3, alpha=6.0, target_modules=["first", "second", "third"], init="lora_ga")
NAMES = ("first", "second", "third")


def peft_eva(model, data, r=3, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=r, lora_alpha=6, target_modules=list(NAMES), init_lora_weights="eva", eva_config=peft.EvaConfig(**options)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(copy.deepcopy(model), config)
        peft.initialize_lora_eva_weights(
            adapted,
            [x for x, _ in data],
            forward_fn=lambda model, x: model(x),
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=None,
            show_progress_bar=False,
        )
    return {name: layer for name in NAMES if hasattr(layer := adapted.base_model.model.get_submodule(name), "lora_A")}


class TestEvaAgainstPeft:
    """One batch, in which PEFT's running decomposition is exact except for its randomized steps."""

    @pytest.mark.parametrize("whiten", [False, True], ids=["plain", "whiten"])
    def test_directions(self, whiten):
        model, data = mlp(), batches()
        theirs = peft_eva(model, data, rho=1.0, whiten=whiten)
        config = LoraConfig(**{**EVA.to_dict(), "init_options": {"whiten": whiten, "niter": None}})
        LoraModel(model, config, init_data=InitData(data))
        for name, layer in theirs.items():
            A = model.get_submodule(name).lora_A["default"].detach()
            expected = layer.lora_A["default"].weight.detach()
            # PEFT has read the batch twice, whose singular values are larger by the root of the times it was read.
            ratio = (A.norm(dim=1) / expected.norm(dim=1)).mean()
            assert whiten or ratio == pytest.approx(1, abs=1e-5)
            sign = (A * expected).sum(1, keepdim=True).sign()
            torch.testing.assert_close(A, sign * ratio * expected, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("rho", [1.5, 2.0, 3.0])
    def test_ranks(self, rho):
        model, data = mlp(wave=60.0), batches()
        theirs = peft_eva(model, data, r=5, rho=rho)
        config = LoraConfig(**{**EVA.to_dict(), "r": 5, "init_options": {"rho": rho, "niter": None}})
        lora = LoraModel(model, config, init_data=InitData(data))
        plan = lora.plans["default"]
        assert {layer.name: layer.r for layer in plan.layers} == {n: layer.r["default"] for n, layer in theirs.items()}
        peers = [layer.scaling["default"] for layer in theirs.values()]
        assert [layer.scaling for layer in plan.layers] == pytest.approx(peers, rel=1e-12)
        assert sum(layer.r for layer in plan.layers) == 15
        assert len({layer.r for layer in plan.layers}) > 1


def peft_lora_ga(model, data, **options):
    """PEFT's layers from seed 0; ours draw from a seed of each layer, which makes no difference beyond rounding."""
    peft, lora = pytest.importorskip("peft"), pytest.importorskip("peft.tuners.lora")
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=list(NAMES),
        init_lora_weights="lora_ga",
        lora_ga_config=lora.LoraGAConfig(**options),
    )
    model = copy.deepcopy(model)

    def step():
        for batch in data:
            loss(model, batch).backward()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora.preprocess_loraga(model, config, step)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config)
    return {name: adapted.base_model.model.get_submodule(name) for name in NAMES}


class TestLoraGaAgainstPeft:
    @pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
    @pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
    @pytest.mark.parametrize("niter", [None, 4], ids=["exact", "randomized"])
    def test_factors_and_base(self, direction, scale, niter):
        model, data = mlp(), batches(3)
        theirs = peft_lora_ga(model, data, direction=direction, scale=scale)
        options = {"direction": direction, "scale": scale, "niter": niter}
        config = LoraConfig(**{**LORA_GA.to_dict(), "init_options": options})
        LoraModel(model, config, init_data=InitData(data, loss))
        for name, layer in theirs.items():
            own = model.get_submodule(name)
            # A singular vector has either sign, which A and B of different vectors do not share; and PEFT's
            # randomized decomposition is exact to about 1e-3 in the smaller of the 2r singular values.
            for mine, peer, axis in (
                (own.lora_A["default"].detach(), layer.lora_A["default"].weight.detach(), 1),
                (own.lora_B["default"].detach(), layer.lora_B["default"].weight.detach(), 0),
            ):
                sign = (mine * peer).sum(axis, keepdim=True).sign()
                ratio = mine.norm() / peer.norm()
                # weight_svd divides by the largest singular value of a random weight, which has no gap to the next: a
                # randomized decomposition without oversampling is off by up to 3 %.
                assert ratio == pytest.approx(1, abs=0.03 if scale == "weight_svd" else 1e-3)
                torch.testing.assert_close(mine, ratio * sign * peer, rtol=1e-3, atol=2e-3 * float(mine.abs().max()))
            # Either signs give the model its start back.
            delta = own.lora_B["default"] @ own.lora_A["default"] * 2
            torch.testing.assert_close(
                model.state_dict()[f"{name}.weight"] + delta, mlp().state_dict()[f"{name}.weight"]
            )

    def test_random_direction_is_a_choice_of_leading_vectors(self):
        model, data = mlp(), batches()
        config = LoraConfig(**{**LORA_GA.to_dict(), "init_options": {"direction": "random", "niter": None}})
        LoraModel(model, config, init_data=InitData(data, loss))
        twin = mlp()
        loss(twin, data[0]).backward()
        _, _, Vh = torch.linalg.svd(twin.first.weight.grad)
        cosines = (model.first.lora_A["default"] @ Vh[:6].T).abs()
        torch.testing.assert_close(cosines.sum(1), torch.ones(3), rtol=0, atol=1e-3)
        assert len(set(cosines.argmax(1).tolist())) == 3

    def test_the_papers_scale_does_not_depend_on_the_size_of_the_gradient(self):
        found = []
        for factor in (1.0, 100.0):
            model = mlp()
            config = LoraConfig(**{**LORA_GA.to_dict(), "init_options": {"scale": "paper", "niter": None}})
            data = InitData(batches(), step=lambda model, batch, factor=factor: factor * loss(model, batch))
            LoraModel(model, config, init_data=data)
            found.append(model.first.lora_B["default"].detach() @ model.first.lora_A["default"].detach())
            expected = torch.full((3,), 30**0.25 / 4)
            torch.testing.assert_close(model.first.lora_B["default"].detach().norm(dim=0), expected)
            torch.testing.assert_close(model.first.lora_A["default"].detach().norm(dim=1), expected)
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def vision_data(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(6, 4, 3, 3, generator=generator, dtype=dtype), torch.randint(0, 4, (6,), generator=generator))
        for _ in range(2)
    ]


TARGETS = ["conv", "up", "attention", "head"]
RUNS = {
    "eva": ({"init": "eva", "r": 2}),
    "eva-rho": ({"init": "eva", "r": 2, "init_options": {"rho": 2.0}}),
    "eva-rho-rslora": ({"init": "eva", "r": 2, "init_options": {"rho": 2.0}, "use_rslora": True}),
    "lora_ga": ({"init": "lora_ga", "r": 2}),
    "lora_ga-parts": ({"init": "lora_ga", "r": 2, "fused_parts": {"attention": ["q", "v"]}}),
    "eva-parts": ({"init": "eva", "r": 2, "fused_parts": {"attention": ["q", "v"]}}),
}
runs = pytest.mark.parametrize("fields", RUNS.values(), ids=RUNS.keys())


class TestEveryLayerType:
    def make(self, fields, dtype=torch.float32):
        torch.manual_seed(0)
        base = Vision().to(dtype)
        model = copy.deepcopy(base)
        config = LoraConfig(target_modules=TARGETS, **fields)
        lora = LoraModel(model, config, init_data=InitData(vision_data(dtype), loss))
        return base, model, lora

    @runs
    def test_starts_as_an_identity_and_gives_the_base_back(self, fields):
        base, model, lora = self.make(fields, torch.float64)
        x = vision_data(torch.float64)[0][0]
        # torch's matmul chooses its kernel by whether the weight requires a gradient.
        expected = base.requires_grad_(False)(x)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
        with lora.disable_adapter():
            assert torch.equal(model(x), expected)
        lora.unload()
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in base.state_dict().items())

    @runs
    def test_loads_without_data_bit_for_bit(self, fields, tmp_path):
        base, model, lora = self.make(fields)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(0.1)
        lora.save_adapter(tmp_path)
        fresh = copy.deepcopy(base)
        loaded = LoraModel.load_adapter(fresh, tmp_path)
        assert fresh.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in model.state_dict().items())
        assert loaded.plans == lora.plans
        loaded.save_adapter(tmp_path / "again")
        loaded.merge_and_unload()

    @pytest.mark.parametrize("fields", [{"init": "eva", "r": 40}], ids=["eva"])
    def test_ranks_that_the_inputs_do_not_have_can_still_be_trained(self, fields):
        _, model, _ = self.make(fields)
        loss(model, vision_data()[0]).backward()
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                assert (parameter.grad.norm(dim=0) > 0).all(), name


class TestRanks:
    def adapted(self, **fields):
        model = mlp(wave=60.0)
        config = LoraConfig(**{**EVA.to_dict(), "init_options": {"rho": 3.0}, "bias": "lora_only", **fields})
        return model, LoraModel(model, config, init_data=InitData(batches()))

    def test_a_layer_that_explains_nothing_is_left_out(self, tmp_path):
        model, lora = self.adapted(r=1)
        names = [layer.name for layer in lora.plans["default"].layers]
        assert names == [name for name in NAMES if hasattr(model.get_submodule(name), "lora_A")]
        assert len(names) < 3
        lora.save_adapter(tmp_path)
        fresh = mlp()
        assert LoraModel.load_adapter(fresh, tmp_path).plans == lora.plans

    def test_combine_with_others(self):
        _, lora = self.adapted()
        lora.add_adapter("other", LoraConfig(r=2, target_modules=["first"], init="none"))
        assert lora.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both") < 1e-6

    def test_are_in_the_file_and_checked(self, tmp_path):
        _, lora = self.adapted()
        lora.save_adapter(tmp_path)
        manifest = json.loads((tmp_path / "adapter.json").read_text())
        assert manifest["ranks"] == {layer.name: layer.r for layer in lora.plans["default"].layers}
        assert manifest["config"]["r"] == 3

    @pytest.mark.parametrize("ranks", [{"fist": 2}, {"first": -1}, {"first": 1.5}, dict.fromkeys(NAMES, 0)], ids=str)
    def test_of_a_third_party_are_checked(self, ranks, untouched):
        class Odd(InitPlugin):
            name = "odd"
            needs = "inputs"

            def allocate(self, requests, options):
                return ranks

            def fill(self, context):
                return {}

        model = mlp()
        registry = registry_of(Odd())
        config = LoraConfig(target_modules=list(NAMES), init="odd")
        with untouched(model), pytest.raises(PluginError, match="'odd' gave"):
            LoraModel(model, config, registry=registry, init_data=InitData(batches()))


class TestRefusals:
    @pytest.mark.parametrize(
        ("init", "options", "match"),
        [
            ("eva", {"rho": 0.5}, "rho of eva"),
            ("eva", {"rho": True}, "rho of eva"),
            ("eva", {"whiten": 1}, "whiten of eva"),
            ("eva", {"niter": -1}, "niter of eva"),
            ("lora_ga", {"direction": "ArB3r"}, "Did you mean .*ArB2r"),
            ("lora_ga", {"scale": "stabel"}, "Did you mean 'stable'"),
            ("lora_ga", {"stable_gamma": 0}, "stable_gamma of lora_ga"),
            ("lora_ga", {"niter": 1.5}, "niter of lora_ga"),
        ],
        ids=str,
    )
    def test_bad_options(self, init, options, match, untouched):
        model = mlp()
        with untouched(model), pytest.raises(ConfigError, match=match):
            LoraModel.plan(model, LoraConfig(init=init, init_options=options))

    def test_inputs_that_do_not_vary(self, untouched):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, bias=False))
        config = LoraConfig(r=2, init="eva", init_options={"rho": 2.0})
        with untouched(model), pytest.raises(ConfigError, match="inputs of all layers are constant"):
            LoraModel(model, config, init_data=InitData([torch.zeros(4, 8)]))

    def test_a_rank_with_too_few_singular_vectors(self, untouched):
        model = mlp()
        config = LoraConfig(**{**LORA_GA.to_dict(), "rank_pattern": {"third": 9}})
        with untouched(model), pytest.raises(TargetError, match=r"'third': .*2r = 18 singular vectors.*has 16"):
            LoraModel(model, config, init_data=InitData(batches(), loss))
