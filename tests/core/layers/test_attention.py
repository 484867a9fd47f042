"""Multi-head attention: the law through its own forward, which never calls its projections."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lora_plugins import LoraConfig, LoraModel

TIGHT = {"rtol": 1e-12, "atol": 1e-12}


def adapt(model: nn.Module, **fields) -> LoraModel:
    return LoraModel(model, LoraConfig(**{"r": 3, "alpha": 5.0, "init": "none", **fields}))


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
