"""Layers that PEFT computes in another way, or not at all: refused or told when files are read and written."""

import re

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_plugins import AdapterFileError, LoraConfig, LoraModel
from tests.core.formats.peft_cases import (
    BY_ID,
    TENSORS,
    TOLERANCE,
    Case,
    Listed,
    Twice,
    difference,
    edit_config,
    edit_tensors,
    read_by_peft,
    refused,
    with_peft,
)
from tests.core.libraries import Conv1D, Conv2dSame


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, groups=2)


class Embedded(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.embed_tokens = nn.Embedding(7, 6, **options)

    def get_input_embeddings(self):
        return self.embed_tokens

    def get_output_embeddings(self):
        return None

    def forward(self, x):
        return self.embed_tokens(x)


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(2 * x)


class Tiled(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x.roll(1, -1), weight, bias)


class Single(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer


class Functional(Single):
    """As the attention of Swin of torchvision, BEiT and EVA."""

    def __init__(self):
        super().__init__(nn.Linear(4, 4))

    def forward(self, x):
        return nn.functional.linear(x, self.layer.weight, self.layer.bias)


class ByMethod(Functional):
    def forward(self, x):
        return self.projected(x)

    def projected(self, x):
        return nn.functional.linear(x, self.layer.weight, self.layer.bias)


class Tokens(Single):
    """As the mask decoder of SAM, and the queries of DETR."""

    def __init__(self):
        super().__init__(nn.ModuleList([nn.Embedding(3, 4)]))

    def forward(self, x):
        return x[:, None] + self.layer[0].weight.unsqueeze(0)


class Casting(Single):
    def __init__(self):
        super().__init__(nn.Linear(4, 4))

    def forward(self, x):
        return self.layer(x.to(self.layer.weight.dtype).reshape(-1, self.layer.weight.shape[1]))


class Alike(Casting):
    def forward(self, x):
        return self.layer(x.type_as(self.layer.weight))


class Asking(Casting):
    def forward(self, x):
        return self.layer(x if isinstance(self.layer.weight, torch.Tensor) else 2 * x)


class Counting(Casting):
    def forward(self, x):
        return self.layer(x) / self.layer.weight.element_size()


class Calling(Casting):
    def forward(self, x):
        return self.layer(x)


def traced():
    """As the feature extractors of torchvision: its forward says of no module that it is from there."""
    return torch.fx.symbolic_trace(Calling())


READERS = {"by a function": Functional, "by a method": ByMethod, "tokens": Tokens}
ASKERS = {"type and shape": Casting, "type of another": Alike, "class": Asking, "bytes": Counting, "traced": traced}

SECOND_PATHS = {
    "padding mode": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), "the padding mode"),
    "dilation": (lambda: nn.Conv1d(3, 4, 3, dilation=2), "the dilation"),
    "max_norm": (lambda: nn.Embedding(5, 4, max_norm=0.5), "max_norm"),
    "forward": (lambda: Doubled(3, 4), "the forward of Doubled"),
    "convolution": (lambda: Tiled(3, 4, 3), "the forward of Tiled"),
    "padding before it": (lambda: Conv2dSame(3, 4, 3), "the forward of Conv2dSame"),
}


class TestLayers:
    @pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
    def test_groups_are_refused_when_read(self, tmp_path, untouched):
        case = Case("", Grouped, {"target_modules": ["conv"]})
        with_peft(case).save_pretrained(tmp_path)
        refused(case, tmp_path, untouched, "'conv' is a convolution of 2 groups")

    @pytest.mark.parametrize(
        ("layer", "match"),
        [
            pytest.param(lambda: nn.Conv2d(4, 8, 3, groups=2), "a convolution of 2 groups", id="groups"),
            pytest.param(lambda: nn.ConvTranspose2d(4, 8, 3), "a layer of type 'conv_transpose2d'", id="transposed"),
            pytest.param(
                lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
                "an adapter of 'k_proj_weight', ",
                id="three weights",
            ),
        ],
    )
    def test_what_others_do_not_have_is_refused_when_written(self, layer, match, tmp_path):
        model = nn.ModuleDict({"layer": layer(), "other": nn.Linear(2, 2)})
        lora = LoraModel(model, LoraConfig(target_modules=["layer", "other"]))
        with pytest.raises(AdapterFileError, match=f"'layer': {match}"):
            lora.save_adapter(tmp_path / "new", format="peft")
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize("part", ["q", "k", "v"])
    def test_one_of_three_weights_is_refused_when_written(self, part, tmp_path):
        model = nn.ModuleDict({"layer": nn.MultiheadAttention(4, 2, kdim=3, vdim=5)})
        lora = LoraModel(model, LoraConfig(target_modules=["layer"], fused_parts={"layer": [part]}))
        match = f"an adapter of '{part}_proj_weight' has no form"
        with pytest.raises(AdapterFileError, match=f"'layer': {match}"):
            lora.save_adapter(tmp_path / "new", format="peft")
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize("targets", [["layer"], ["layer.out_proj"]], ids=["inner", "outer"])
    def test_dora_on_a_projection_of_an_attention_is_refused_when_written(self, targets, tmp_path):
        model = nn.ModuleDict({"layer": nn.MultiheadAttention(4, 2)})
        lora = LoraModel(model, LoraConfig(target_modules=targets, variant="dora"))
        with pytest.raises(AdapterFileError, match=f"'{targets[0]}': PEFT has no DoRA on attention"):
            lora.save_adapter(tmp_path / "new", format="peft")
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize("format", ["diffusers", "kohya"])
    def test_the_output_projection_of_an_attention_is_refused_by_formats_of_pipelines(self, format, tmp_path):
        model = nn.ModuleDict({"layer": nn.MultiheadAttention(4, 2), "other": nn.Linear(2, 2)})
        lora = LoraModel(model, LoraConfig(target_modules=["out_proj", "other"]))
        path = tmp_path / "new.safetensors"
        with pytest.raises(AdapterFileError, match=r"'layer\.out_proj': the output projection of an attention, which"):
            lora.save_adapter(path, format=format, format_options={"component": "unet"})
        assert not path.exists()

    def test_shared_layers_are_refused_when_written(self, tmp_path):
        shared, tied = nn.Linear(4, 4), nn.Linear(4, 4)
        tied.weight = shared.weight
        lora = LoraModel(nn.ModuleDict({"a": shared, "b": shared, "c": tied}), LoraConfig())
        with pytest.raises(AdapterFileError, match=r"(?s)more than once.*a weight that several adapted layers share"):
            lora.save_adapter(tmp_path / "new", format="peft")

    def test_a_parameter_alone_is_refused_when_written(self, tmp_path):
        class Positions(nn.Module):
            def __init__(self):
                super().__init__()
                self.position = nn.Parameter(torch.zeros(4))
                self.layer = nn.Linear(4, 4)

        lora = LoraModel(Positions(), LoraConfig(target_modules=["layer"], modules_to_save=["position"]))
        with pytest.raises(AdapterFileError, match=r"'position' was trained by itself"):
            lora.save_adapter(tmp_path / "new", format="peft")
        assert not (tmp_path / "new").exists()

    @pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
    def test_the_copy_of_an_embedding_is_compared(self, tmp_path, untouched):
        case = Case("", Embedded, {"target_modules": ["embed_tokens"]})
        theirs = with_peft(case)
        theirs.save_pretrained(tmp_path)
        key = "base_model.model.embed_tokens.base_layer.weight"
        assert key in load_file(tmp_path / TENSORS)
        model, x = case.build(), torch.tensor([[1, 2]])
        LoraModel.load_adapter(model, tmp_path)
        torch.testing.assert_close(model(x), theirs(x), rtol=0, atol=TOLERANCE)
        edit_tensors(tmp_path, lambda tensors: tensors[key].add_(1))
        refused(case, tmp_path, untouched, "comes with its own 'embed_tokens.weight'")

    @pytest.mark.parametrize(("layer", "left_out"), SECOND_PATHS.values(), ids=SECOND_PATHS)
    def test_a_second_path_that_is_not_the_layer_is_said_when_read(self, layer, left_out, tmp_path):
        case = Case("", lambda: Single(layer()), {"target_modules": ["layer"]})
        theirs = with_peft(case)
        theirs.save_pretrained(tmp_path)
        model = case.build()
        with pytest.warns(UserWarning, match=rf"'layer': PEFT can compute something else before.*{left_out}\. "):
            LoraModel.load_adapter(model, tmp_path)
        merged = theirs.merge_and_unload().layer.weight
        torch.testing.assert_close(model.layer.weight.detach(), merged.detach(), rtol=0, atol=TOLERANCE)

    @pytest.mark.parametrize(("build", "other"), [(Twice, "again"), (Listed, "layers[0]")], ids=["twice", "in a list"])
    def test_a_layer_that_has_another_name_is_said_when_read(self, build, other, tmp_path):
        """PEFT wraps it under its first name, and what calls it by the other one calls the base."""
        case = Case("", build, {"target_modules": ["first"]})
        theirs = with_peft(case)
        theirs.save_pretrained(tmp_path)
        model = case.build()
        with pytest.warns(UserWarning, match=f"'first': PEFT can compute .* the layer as {re.escape(repr(other))}"):
            LoraModel.load_adapter(model, tmp_path)
        x = torch.ones(2, 4, dtype=torch.float64)
        torch.testing.assert_close(model(x), theirs.merge_and_unload()(x), rtol=0, atol=TOLERANCE)

    @pytest.mark.parametrize(("layer", "left_out"), SECOND_PATHS.values(), ids=SECOND_PATHS)
    def test_a_second_path_that_is_not_the_layer_is_said_when_written(self, layer, left_out, tmp_path):
        case = Case("", lambda: Single(layer()), {"target_modules": ["layer"]})
        lora = LoraModel(case.build(), LoraConfig(r=2, init="none", target_modules=["layer"]))
        with pytest.warns(UserWarning, match=rf"'layer': PEFT can compute something else before.*{left_out}\. "):
            lora.save_adapter(tmp_path / "new", format="peft")
        merged = read_by_peft(case, tmp_path / "new").merge_and_unload().layer.weight
        torch.testing.assert_close(lora.model.layer.weight.detach(), merged.detach(), rtol=0, atol=TOLERANCE)

    @pytest.mark.parametrize("net", READERS.values(), ids=READERS)
    def test_a_weight_that_another_module_computes_with_is_said(self, net, tmp_path):
        """The adapter of PEFT has no effect there until it is merged."""
        case = Case("", lambda: nn.Sequential(net()))
        lora = LoraModel(case.build(), LoraConfig(r=2, init="none", target_modules="all"))
        (name,) = (layer.name for layer in lora.plans["default"].layers)
        said = rf"'{re.escape(name)}': PEFT can compute .* what {net.__name__} computes with the weight itself\. "
        with pytest.warns(UserWarning, match=said):
            lora.save_adapter(tmp_path, format="peft")
        theirs, x = read_by_peft(case, tmp_path), torch.eye(4, dtype=torch.float64)
        torch.testing.assert_close(theirs(x), case.build()(x), rtol=0, atol=0)
        torch.testing.assert_close(theirs.merge_and_unload()(x), lora.model(x), rtol=0, atol=TOLERANCE)
        with pytest.warns(UserWarning, match=said):
            LoraModel.load_adapter(case.build(), tmp_path)

    @pytest.mark.parametrize("net", ASKERS.values(), ids=ASKERS)
    def test_a_weight_that_is_asked_for_its_type_is_not(self, net, tmp_path):
        case = Case("", lambda: nn.Sequential(net()))
        lora = LoraModel(case.build(), LoraConfig(r=2, init="none", target_modules=["0.layer"]))
        lora.save_adapter(tmp_path, format="peft")
        x = torch.eye(4, dtype=torch.float64)
        torch.testing.assert_close(read_by_peft(case, tmp_path)(x), lora.model(x), rtol=0, atol=TOLERANCE)

    @pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
    def test_dropout_that_a_layer_cannot_honor_is_left_out_and_said(self, tmp_path):
        case = BY_ID["embedding and Conv1D"]
        theirs = with_peft(case, lora_dropout=0.1)
        theirs.save_pretrained(tmp_path)
        model = case.build()
        with pytest.warns(UserWarning, match=r"loaded without its dropout of 0\.1"):
            LoraModel.load_adapter(model, tmp_path)
        assert difference(case, model, theirs) <= TOLERANCE

    def test_a_parameter_whose_rows_are_no_outputs_is_refused(self, tmp_path, untouched):
        """`Conv1D` of transformers keeps its inputs first; a square one would be loaded transposed."""

        class Square(nn.Module):
            def __init__(self):
                super().__init__()
                self.mixer = Conv1D(6, 6)

        case = Case("", Square, {"target_parameters": ["mixer.weight"], "target_modules": []})
        with_peft(case).save_pretrained(tmp_path)
        refused(case, tmp_path, untouched, "'mixer.weight' is not the weight of a linear layer")

    @pytest.mark.parametrize(
        ("parameters", "match"),
        [
            pytest.param(["experts.up"], r"'experts\.up' holds several matrices", id="one"),
            pytest.param(["experts.up", "experts.down"], "two parameters of 'experts' are adapted", id="two"),
        ],
    )
    def test_matrices_of_experts_are_refused(self, parameters, match, tmp_path, untouched):
        class Experts(nn.Module):
            def __init__(self):
                super().__init__()
                self.up, self.down = nn.Parameter(torch.randn(3, 6, 4)), nn.Parameter(torch.randn(3, 4, 6))

        class Mixture(nn.Module):
            def __init__(self):
                super().__init__()
                self.experts = Experts()

        case = Case("", Mixture, {"target_parameters": parameters, "target_modules": []})
        with_peft(case).save_pretrained(tmp_path)
        refused(case, tmp_path, untouched, match)

    def test_a_parameter_of_another_rank_is_none_of_experts(self, tmp_path, untouched):
        case = Case("", lambda: Single(nn.Linear(4, 8)), {"target_parameters": ["layer.weight"], "target_modules": []})
        with_peft(case).save_pretrained(tmp_path)
        edit_config(tmp_path, r=5)
        refused(case, tmp_path, untouched, "'layer.weight' has rank 2 in the tensors and 5 in the config")
