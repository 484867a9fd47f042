"""Multi-head attention: the law through its own forward, which never calls its projections."""

import contextlib
import copy

import pytest
import torch
from torch import Tensor, nn

from lora_plugins import LoraConfig, LoraModel

TIGHT = {"rtol": 1e-12, "atol": 1e-12}


def adapt(model: nn.Module, **fields) -> LoraModel:
    return LoraModel(model, LoraConfig(**{"r": 3, "alpha": 5.0, "init": "none", **fields}))


BARELY = 1e-9
"""A dropout that drops next to nothing, and takes the way of one that does."""

NEAR = {"rtol": 1e-3, "atol": 1e-4}
"""Masks are drawn in steps of 2^-16, by which what is kept is scaled."""

PADDED = torch.tensor([[False, False, True, False, True], [False, True, False, False, False]])
CALLS = {
    "plain": ({}, {}),
    "no_weights": ({}, {"need_weights": False}),
    "weights_of_heads": ({}, {"average_attn_weights": False}),
    "padding": ({}, {"key_padding_mask": PADDED}),
    "padding-no_weights": ({}, {"key_padding_mask": PADDED, "need_weights": False}),
    "mask": ({}, {"attn_mask": torch.tensor([[0, 1, 0, 0, 1], [1, 0, 0, 1, 0], [0, 0, 0, 0, 1]]).bool()}),
    "mask_of_numbers": ({}, {"attn_mask": torch.arange(15.0, dtype=torch.float64).view(3, 5) / 7}),
    "mask_of_heads": ({}, {"attn_mask": torch.arange(60.0, dtype=torch.float64).view(4, 3, 5) / 30}),
    "positions_first": ({"batch_first": False}, {}),
    "widths": ({"kdim": 6, "vdim": 10}, {}),
    "no_bias": ({"bias": False}, {}),
    "no_bias-widths": ({"bias": False, "kdim": 6}, {}),
    "more_keys": ({"add_bias_kv": True, "add_zero_attn": True}, {"key_padding_mask": PADDED}),
}


class TestDropout:
    """Of the updates, not of the attention itself."""

    def make(self, dropout: float, variant: str = "lora", **options) -> tuple[nn.Module, list[nn.Parameter]]:
        torch.manual_seed(0)
        options = {"batch_first": True, **options}
        model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, **options)}).double()
        adapt(model, dropout=dropout, variant=variant)
        return model["attention"], [p for p in model.parameters() if p.requires_grad]

    def inputs(self, batch_first: bool = True, kdim: int = 8, vdim: int = 8, **_) -> list[Tensor]:
        torch.manual_seed(1)
        given = [torch.randn(2, n, size, dtype=torch.float64) for n, size in ((3, 8), (5, kdim), (5, vdim))]
        return [(x if batch_first else x.transpose(0, 1)).requires_grad_() for x in given]

    @pytest.mark.parametrize("variant", ["lora", "dora"])
    @pytest.mark.parametrize(("options", "named"), CALLS.values(), ids=CALLS)
    def test_all_else_is_as_without_it(self, options, named, variant):
        found = []
        for dropout in (0.0, BARELY):
            attention, leaves = self.make(dropout, variant, **options)
            inputs = self.inputs(**options)
            outputs = [y for y in attention(*inputs, **named) if y is not None]
            loss = sum(y.sin().sum() for y in outputs)
            found.append([*outputs, *torch.autograd.grad(loss, [*inputs, *leaves])])
        torch.testing.assert_close(found[1], found[0], **NEAR)

    @pytest.mark.parametrize("shape", [(5, 8), (2, 5, 8)], ids=["unbatched", "batched"])
    def test_one_input_is_dropped_once(self, shape):
        attention, _ = self.make(0.5)
        x = torch.randn(shape, dtype=torch.float64)
        projected = []
        for inputs in ((x, x, x), (x, x.clone(), x.clone())):
            torch.manual_seed(2)
            projected.append(attention(*inputs, need_weights=False)[0])
            assert projected[-1].shape == shape
        assert not torch.equal(*projected)

    def test_the_output_projection_is_dropped_by_itself(self):
        attention, _ = self.make(0.5)
        with torch.no_grad():
            for name in ("lora_A", "lora_B"):
                attention._modules[name]["default"].zero_()
        x = self.inputs()[0].detach()
        many = x.repeat(4000, 1, 1)
        outputs = attention(many, many, many)[0].detach().unflatten(0, (4000, -1))
        exact = attention.eval()(x, x, x)[0].detach()
        assert outputs.std(0).min() > 0
        assert (outputs.mean(0) - exact).abs().max() < 5 * outputs.std(0).max() / 4000**0.5

    def test_hooks_of_the_output_projection_are_not_run(self):
        """As torch does not call it."""
        attention, _ = self.make(BARELY)
        attention.out_proj.register_forward_hook(lambda *_: 1 / 0)
        x = self.inputs()[0]
        torch.testing.assert_close(attention(x, x, x)[0], attention.eval()(x, x, x)[0], **NEAR)

    @pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
    def test_an_encoder_trains_with_it(self, causal):
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double()
        adapt(model, dropout=BARELY)
        x, mask = torch.randn(2, 5, 8, dtype=torch.float64), nn.Transformer.generate_square_subsequent_mask(5).double()
        asked = {"mask": mask, "is_causal": True} if causal else {}
        trained = model(x, **asked)
        torch.testing.assert_close(trained, model.eval()(x, **asked), **NEAR)

    def test_it_compiles_whole(self):
        torch._dynamo.reset()
        attention, leaves = self.make(BARELY)
        inputs = self.inputs()
        compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
        torch.manual_seed(2)
        got, wanted = (
            [y, *torch.autograd.grad(y.sin().sum(), leaves)] for y in (m(*inputs)[0] for m in (compiled, attention))
        )
        torch.testing.assert_close(got, wanted, **NEAR)


class TestMultiheadAttention:
    WIDTHS = pytest.mark.parametrize("widths", [{}, {"kdim": 6, "vdim": 10}], ids=["fused", "separate"])

    def make(self, **options) -> nn.MultiheadAttention:
        return nn.MultiheadAttention(8, 2, batch_first=True, **options).double()

    def inputs(self, widths: dict[str, int]) -> tuple[Tensor, Tensor, Tensor]:
        sizes = (8, widths.get("kdim", 8), widths.get("vdim", 8))
        return tuple(
            torch.randn(2, length, size, dtype=torch.float64) for length, size in zip((3, 5, 5), sizes, strict=True)
        )

    @WIDTHS
    @pytest.mark.parametrize("targets", [["attention"], ["attention.out_proj"], "all"], ids=str)
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    def test_law(self, widths, targets, training):
        model = nn.ModuleDict({"attention": self.make(**widths)}).train(training)
        plain = copy.deepcopy(model)
        original = copy.deepcopy(model.state_dict())
        lora = adapt(model, target_modules=targets)
        q, k, v = self.inputs(widths)
        attention = model["attention"]
        with torch.no_grad():
            for layer, own in ((attention, plain["attention"]), (attention.out_proj, plain["attention"].out_proj)):
                for key in [name for name in layer._modules if name.startswith("lora_A")]:
                    part = key.removeprefix("lora_A").removeprefix("_")
                    tensor = (
                        f"{part}_proj_weight" if part else "weight" if layer is attention.out_proj else "in_proj_weight"
                    )
                    A, B = layer._modules[key]["default"], layer._modules[key.replace("_A", "_B")]["default"]
                    getattr(own, tensor).add_(5 / 3 * B @ A)
        output = attention(q, k, v)[0]
        torch.testing.assert_close(output, plain["attention"](q, k, v)[0], **TIGHT)
        output.square().sum().backward()
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert trained
        assert all("lora_" in name and model.get_parameter(name).grad.abs().max() > 0 for name in trained)
        with torch.no_grad():
            output = attention(q, k, v)[0]  # without gradients, eval mode takes the fused kernel
            lora.merge_adapter()
            torch.testing.assert_close(attention(q, k, v)[0], output, **TIGHT)
        lora.unload()
        assert type(attention) is nn.MultiheadAttention
        assert all(torch.equal(value, original[key]) for key, value in model.state_dict().items())

    @WIDTHS
    def test_parts(self, widths):
        model = nn.ModuleDict({"attention": self.make(**widths)})
        adapt(model, target_modules=["attention"], fused_parts={"attention": ["q", "v"]})
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        assert names == {f"attention.lora_{factor}_{part}.default" for factor in "AB" for part in "qv"}

    @WIDTHS
    def test_an_adapter_of_other_parts_that_rests_does_nothing(self, widths):
        model = nn.ModuleDict({"attention": self.make(**widths)})
        lora = adapt(model, target_modules=["attention"], fused_parts={"attention": ["q"]})
        given = self.inputs(widths)
        expected = model["attention"](*given)[0]
        lora.add_adapter("v", LoraConfig(target_modules=["attention"], fused_parts={"attention": ["v"]}))
        lora.set_adapter("default")
        assert torch.equal(model["attention"](*given)[0], expected)

    def test_finite_differences(self):
        model = nn.ModuleDict({"attention": self.make()})
        adapt(model, r=1)
        q, k, v = self.inputs({})
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        attention = model["attention"]

        def run(*tensors: Tensor) -> Tensor:
            values = {name.removeprefix("attention."): t for name, t in zip(names, tensors, strict=True)}
            return torch.func.functional_call(attention, values, (q, k, v))[0]

        leaves = tuple(model.get_parameter(name).detach().clone().requires_grad_() for name in names)
        assert torch.autograd.gradcheck(run, leaves)

    @pytest.mark.parametrize("norm_first", [True, False], ids=["pre", "post"])
    def test_transformer_encoder_fast_path(self, norm_first):
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()
        x = torch.randn(2, 5, 8, dtype=torch.float64)
        with torch.no_grad():
            before = model(x)
        lora = adapt(model)
        slow = model(x).detach()
        with torch.no_grad():
            fast = model(x)
            torch.testing.assert_close(fast, slow, **TIGHT)
            assert not torch.allclose(fast, before)
            lora.merge_adapter()
            torch.testing.assert_close(model(x), slow, **TIGHT)


def test_parts_of_an_attention_are_not_asked_of_its_output_projection():
    model = nn.ModuleDict({"mha": nn.MultiheadAttention(12, 2)})
    config = LoraConfig(r=2, target_modules=["mha", "mha.out_proj"], fused_parts={"mha": ["q", "v"]})
    found = {layer.name: [slot.part for slot in layer.slots] for layer in LoraModel.plan(model, config).layers}
    assert found == {"mha": ["q", "v"], "mha.out_proj": [""]}


class Sevenfold(nn.modules.linear.NonDynamicallyQuantizableLinear):
    """An output projection with a forward, which no attention calls."""

    def forward(self, x: Tensor) -> Tensor:
        return 7 * super().forward(x)


@pytest.mark.parametrize("mixed", [False, True], ids=["dropout", "mixed"])
def test_a_forward_of_the_output_projection_is_not_called(mixed):
    torch.manual_seed(0)
    model = nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2, batch_first=True)}).double()
    model["mha"].out_proj = Sevenfold(8, 8).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    lora = adapt(model, target_modules=["mha"], dropout=0.0 if mixed else BARELY)
    expected = model.eval()["mha"](x, x, x)[0]
    with lora.mixed_batch(["default", "default"]) if mixed else contextlib.nullcontext():
        found = model.train(not mixed)["mha"](x, x, x)[0]
    torch.testing.assert_close(found, expected, **NEAR)
