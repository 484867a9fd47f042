"""One batch whose rows have different adapters computes what each row would compute with its adapter alone."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from lora_plugins import LayerPlugin, LoraConfig, LoraModel, StateError
from lora_plugins import plugins as kinds
from lora_plugins.plugins import default_registry
from tests.core.libraries import Conv1D, Conv2dSame, DeformConv2d, create_model

TIGHT = {"rtol": 1e-12, "atol": 1e-12}


class Words(nn.Module):
    """An embedding and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6, padding_idx=0)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x))


class Attends(nn.Module):
    """An attention of a sequence on itself, and on what is left without its first position."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.own = nn.MultiheadAttention(8, 2, **{"batch_first": True, **options})

    def forward(self, x: Tensor) -> Tensor:
        x, weights = self.own(x, x, x)
        return self.own(x, x[:, 1:], x[:, 1:], average_attn_weights=False)[0] + weights.sum()


class Deforms(nn.Module):
    """A deformable convolution, of places and of shares of them that the image itself says."""

    def __init__(self, groups: int = 1, masked: bool = False) -> None:
        super().__init__()
        self.own, self.masked = DeformConv2d(4, 8, 3, groups=groups), masked

    def forward(self, x: Tensor) -> Tensor:
        places = x.mean(1, keepdim=True)[..., 1:-1, 1:-1]
        return self.own(
            x, places.expand(-1, 18, -1, -1), places.sigmoid().expand(-1, 9, -1, -1) if self.masked else None
        )


class OfOneWeight(nn.Module):
    """Two layers of one weight."""

    def __init__(self, second=nn.Linear) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), second(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def images() -> Tensor:
    return torch.randn(5, 3, 16, 16, dtype=torch.float64)


MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), lambda: torch.randn(5, 3, 6)),
    "conv": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)
        ),
        images,
    ),
    "conv-circular": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")), images),
    "embedding": (Words, lambda: torch.randint(9, (5, 7))),
    "tied": (OfOneWeight, lambda: torch.randn(5, 3, 6)),
    "encoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2, enable_nested_tensor=False
        ),
        lambda: torch.randn(5, 3, 8),
    ),
    "vit": (
        lambda: create_model(
            "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=3
        ),
        images,
    ),
}


def adapted(make, dtype=torch.float64, **fields) -> LoraModel:
    torch.manual_seed(0)
    model = make().to(dtype).eval()
    lora = LoraModel(model, LoraConfig(r=2, init="none", **fields), "a")
    lora.add_adapter("b", LoraConfig(r=3, alpha=2, init="none"))
    lora.add_adapter("c", LoraConfig(r=1, init="none"))
    return lora


def by_rows(lora: LoraModel, x: Tensor, rows) -> Tensor:
    with torch.no_grad(), lora.mixed_batch(rows) as model:
        return model(x)


def alone(lora: LoraModel, x: Tensor, name: str | None) -> Tensor:
    with torch.no_grad():
        if name is None:
            with lora.disable_adapter() as model:
                return model(x)
        lora.set_adapter(name)
        return lora.model(x)


def assert_each_alone(mixed: Tensor, lora: LoraModel, x: Tensor, rows) -> None:
    for at, name in enumerate(rows):
        torch.testing.assert_close(mixed[at : at + 1], alone(lora, x[at : at + 1], name), **TIGHT)


@pytest.mark.parametrize(("make", "batch"), MODELS.values(), ids=MODELS)
def test_each_row_is_what_its_adapter_alone_gives(make, batch):
    lora, x = adapted(make), batch()
    x = x.double() if x.is_floating_point() else x
    rows = ["a", "c", None, "b", "a"]
    assert_each_alone(by_rows(lora, x, rows), lora, x, rows)


def test_the_model_is_as_before_afterwards():
    lora = adapted(MODELS["linear"][0])
    x = torch.randn(5, 3, 6, dtype=torch.float64)
    before, classes = lora.model(x), [type(module) for module in lora.model.modules()]
    with lora.mixed_batch(["a", "b", None, "b", "a"]):
        pass
    assert lora.active_adapters == ("a",)
    assert [type(module) for module in lora.model.modules()] == classes
    assert torch.equal(lora.model(x), before)
    assert lora.model[0].lora_A["a"].requires_grad


def refused(lora: LoraModel, match: str, rows=("a", "b")) -> None:
    with pytest.raises(StateError, match=match), lora.mixed_batch(list(rows)) as model:
        model(torch.randn(2, 6, dtype=torch.float64))


def test_training_is_refused():
    lora = adapted(MODELS["linear"][0])
    lora.model.train()
    refused(lora, r"for inference. Call model.eval\(\) first")


def test_training_of_a_part_is_refused():
    """As where a module puts its teacher or its backbone into a mode of its own."""
    lora = adapted(MODELS["linear"][0])
    lora.model[0].train()
    refused(lora, r"'0' is in training mode inside mixed_batch\(\)")


def test_an_unknown_adapter_is_refused():
    refused(adapted(MODELS["linear"][0]), "no adapter 'bb'", rows=("a", "bb"))


def test_a_merged_adapter_is_refused():
    lora = adapted(MODELS["linear"][0])
    lora.merge_adapter()
    refused(lora, "not possible while 'a' is merged")


def scrambled(lora):
    """Gives everything that adapters have values of their own, one adapter after the other."""
    for name in lora.adapters:
        lora.set_adapter(name)
        with torch.no_grad():
            for parameter in lora.model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn_like(parameter) / 4)
    lora.model.eval()
    return lora


class Head(nn.Module):
    """A head of several layers, whose output has another shape than its input, and a sum that it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor, *, factor: float = 1.0) -> Tensor:
        return self.layers(self.norm(x)) * self.scale * factor


@pytest.mark.parametrize("fields", [{}, {"norm": "track"}, {"modules_to_save": ["1", "2"]}], ids=str)
@pytest.mark.parametrize("head", [lambda: nn.Linear(8, 4), Head], ids=["linear", "module"])
def test_each_row_has_the_head_of_its_adapter(head, fields):
    saved = fields.get("modules_to_save", ["2"])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), head()).double().eval()
    config = LoraConfig(**{"r": 2, "target_modules": "0", "init": "none", **fields, "modules_to_save": saved})
    lora = LoraModel(model, config, "a")
    lora.add_adapter("b", config)
    lora.add_adapter("plain", LoraConfig(r=3, target_modules="0", init="none"))
    scrambled(lora)
    x = torch.randn(7, 6, dtype=torch.float64)
    rows = ["b", "a", None, "plain", "b", "a", "a"]
    kinds, before = [type(module) for module in lora.model.modules()], copy.deepcopy(lora.model.state_dict())
    mixed = by_rows(lora, x, rows)
    assert [type(module) for module in lora.model.modules()] == kinds
    assert all(torch.equal(value, before[key]) for key, value in lora.model.state_dict().items())
    assert_each_alone(mixed, lora, x, rows)
    assert not torch.allclose(mixed[1], alone(lora, x[1:2], "plain")[0])


class BodyAndHead(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 4)


class Past(BodyAndHead):
    """Reads the weight of its head without calling it."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.body(x), self.head.weight)


class Tied(nn.Module):
    """Has a second module with the parameter of its head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.other = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.other.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.body(x))


class Rowless(BodyAndHead):
    """Calls its head with its rows and another dimension in one."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).repeat(2, 1))


def two(model, **fields):
    config = LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"], init="none", **fields)
    lora = LoraModel(model.double().eval(), config, "a")
    lora.add_adapter("b", config)
    return scrambled(lora)


def test_a_head_that_is_read_past_its_forward_is_refused():
    refused(two(Past()), "'weight' of 'head' is read without calling it")


def test_a_head_that_shares_its_parameter_has_its_rows_there_too():
    lora, x, rows = two(Tied()), torch.randn(3, 6, dtype=torch.float64), ["a", None, "b"]
    assert_each_alone(by_rows(lora, x, rows), lora, x, rows)


class Convolutional(nn.Module):
    """Has a head whose class reads its bias to show itself, and a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Sequential(nn.Conv1d(1, 2, 3), nn.BatchNorm1d(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[:, None])


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_head_by_rows_is_not_copied(copied):
    lora = two(Convolutional())
    with lora.mixed_batch(["a", None]) as model, pytest.raises(StateError, match=r"'head\.0' cannot be copied"):
        copied(model.head)
    copied(lora.model)


def test_heads_by_rows_are_in_the_mode_of_the_model():
    """Also where an inner block ended in training mode, and made the heads of the outer one again."""
    lora, x, rows = two(Convolutional()), torch.randn(3, 6, dtype=torch.float64), ["a", None, "b"]
    with torch.no_grad(), lora.mixed_batch(rows) as model:
        expected = model(x)
        with lora.mixed_batch([None] * 3):
            model.train()
        assert torch.equal(model.eval()(x), expected)


def test_a_stored_layer_has_biases_by_rows():
    model = nn.ModuleDict({"body": nn.Linear(64, 6, bias=False), "head": nn.Linear(6, 8)}).double().eval()
    lora = LoraModel(
        model, LoraConfig(r=2, target_modules=["head"], quantize="nf4", quantize_options={"min_size": 0}, init="none")
    )
    lora.unload(dequantize=False)
    lora = scrambled(LoraModel(model, LoraConfig(r=2, target_modules=["body"], bias="all", init="none"), "a"))
    x = torch.randn(2, 6, dtype=torch.float64)
    own = model.head(x)
    with torch.no_grad(), lora.mixed_batch(["a", None]):
        mixed = model.head(x)
    with torch.no_grad(), lora.disable_adapter():
        base = model.head(x)
    torch.testing.assert_close(mixed, torch.stack([own[0], base[1]]), **TIGHT)
    assert not torch.allclose(own, base)


def test_a_model_that_has_heads_by_rows_is_shown_and_planned():
    lora = two(Convolutional())
    shown, config = repr(lora.model.head), LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"])
    planned = LoraModel.plan(lora.model, config)
    with lora.mixed_batch(["a", None, "b"]) as model:
        assert repr(model.head) == shown.replace("Conv1d", "RowsConv1d").replace("BatchNorm1d", "RowsBatchNorm1d")
        assert LoraModel.plan(model, config) == planned


def test_a_module_with_rows_is_planned_by_its_own_class():
    lora = LoraModel(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), LoraConfig(target_modules=["0"]), "a")
    lora.add_adapter("b", LoraConfig(target_modules=["0"], modules_to_save=["1"]))
    config = LoraConfig(target_modules=["1"], dropout=0.1)  # which the branch of that class honors, no other's does
    planned = LoraModel.plan(lora.model.eval(), config)
    with lora.mixed_batch(["a", "b"]) as model:
        assert LoraModel.plan(model, config) == planned


def test_a_head_without_rows_is_refused():
    refused(two(Rowless()), r"'head', .* gets tensors of the shapes \[4, 6\] for a batch of 2")


class ByName(BodyAndHead):
    """Gives its head the rows by name."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(input=self.body(x))


class Twice(BodyAndHead):
    """A head that is given two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Bilinear(6, 6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x), x)


@pytest.mark.parametrize(
    ("model", "shapes"), [(ByName, r"\[2, 6\]"), (Twice, r"\[2, 6\], \[2, 6\]")], ids=["by-name", "two"]
)
def test_a_head_that_is_given_no_tensor_first_or_another_one_is_refused(model, shapes):
    refused(two(model()), rf"'head', .* gets tensors of the shapes {shapes} for a batch of 2 .* It has to get one")


class Pair(nn.Linear):
    """A head that returns two tensors."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x


def test_a_head_that_returns_no_tensor_is_refused():
    model = nn.Sequential(nn.Linear(6, 8), Pair(8, 4)).double().eval()
    config = LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"], init="none")
    lora = LoraModel(model, config, "a")
    lora.add_adapter("b", config)
    refused(lora, "'1', of which adapters have their own values, does not return one tensor with the batch first")


def test_heads_by_rows_are_cast_with_the_model():
    lora, x, rows = two(Convolutional()), torch.randn(3, 6), ["a", None, "b"]
    with torch.no_grad(), lora.mixed_batch(rows) as model:
        expected = model(x.double())
        torch.testing.assert_close(model.float()(x), expected.float())


def test_own_biases_of_adapted_layers_are_refused():
    lora = adapted(MODELS["linear"][0], bias="lora_only", target_modules=["0"])
    refused(lora, "own values of what '0' holds, beside updates")


def test_another_number_of_rows_is_refused():
    said = "'0' gets 2 rows for a batch of 3 adapter names. Give one name for each row"
    refused(adapted(MODELS["linear"][0]), said, rows=("a", "b", None))


def test_a_layer_without_a_branch_is_refused():
    lora = adapted(lambda: nn.Sequential(nn.Linear(6, 6), nn.ConvTranspose1d(6, 4, 1)))
    refused(lora, "'1': the plugin 'conv_transpose1d' has no branch for that")


UNABLE = {
    "positions_first": (lambda: nn.Sequential(Attends(batch_first=False)), "'0.own': with batch_first=False"),
    "widths": (lambda: nn.Sequential(Attends(kdim=6)), "'0.own': 'multihead_attention' layers have updates of several"),
    "max_norm": (lambda: nn.Sequential(nn.Embedding(9, 6, max_norm=1.0)), "'0': max_norm holds for the rows"),
    "tied": (lambda: nn.Sequential(OfOneWeight(nn.Embedding)), "'0.second': it shares the weight of '0.first'"),
    "subclass": (lambda: nn.Sequential(Scaled(6, 6)), "'0': the plugin 'linear' has no branch for the class Scaled"),
}


class Scaled(nn.Linear):
    """A layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


@pytest.mark.parametrize(("make", "match"), UNABLE.values(), ids=UNABLE)
def test_layers_that_cannot_mix_are_named_before_anything_is_run(make, match):
    lora = adapted(make)
    with pytest.raises(StateError, match=match), lora.mixed_batch(["a", "b"]):
        raise AssertionError


def test_one_of_three_weights_of_an_attention_is_refused():
    lora = adapted(lambda: nn.Sequential(Attends(kdim=6)), target_modules=["own"], fused_parts={"own": ["q"]})
    with pytest.raises(StateError, match="query, key and value have a weight each"), lora.mixed_batch(["a"]):
        raise AssertionError


def test_a_weight_read_past_its_layer_is_refused():
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.layer.weight.T

    refused(adapted(Reader), "The weight of 'layer' is used by another module")


class Asking(BodyAndHead):
    """Asks what weights are like and computes with none, as models of transformers do."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.body, self.head):
            weight = layer.weight
            assert weight.shape == (layer.out_features, 6) == (weight.size(0), weight.size(-1))
            assert (weight.ndim, weight.dim(), len(weight)) == (2, 2, layer.out_features)
            assert not hasattr(weight, "__array_interface__")  # as libraries ask of any object
            assert weight.numel() == 6 * layer.out_features
            assert weight.is_floating_point()
            x = layer(x.to(device=weight.device, dtype=weight.dtype).to(weight).type_as(weight))
        return x


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_what_a_weight_is_like_can_be_asked(compiled: bool):
    lora, x, rows = two(Asking()), torch.randn(3, 6, dtype=torch.float64), ["a", None, "b"]
    with torch.no_grad(), lora.mixed_batch(rows) as model:
        run = torch.compile(model, backend="eager") if compiled else model
        mixed = run(x)
    assert_each_alone(mixed, lora, x, rows)


class KeepsFloat(nn.Module):
    """Casts to the type of a weight if that is a tensor: the MLPs of T5 and Pix2Struct, which keep `wo` in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.wi, self.wo = nn.Linear(6, 6, dtype=torch.bfloat16), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wi(x)
        if isinstance(self.wo.weight, torch.Tensor) and x.dtype != self.wo.weight.dtype:
            x = x.to(self.wo.weight.dtype)
        return self.wo(x)


def test_a_weight_counts_as_a_tensor():
    model = KeepsFloat().eval()
    lora, x = LoraModel(model, LoraConfig(r=2, init="none", target_modules=["wo"]), "a"), torch.randn(2, 6).bfloat16()
    with torch.no_grad():
        expected = model(x)
        with lora.mixed_batch(["a", None]):
            mixed = model(x)
        torch.testing.assert_close(mixed[0], expected[0])
        with lora.disable_adapter():
            torch.testing.assert_close(mixed[1], model(x)[1])


@pytest.mark.parametrize(
    "use",
    [torch.sum, torch.clone, list, bool, lambda w: w.to(torch.float32), lambda w: w + 1, lambda w: torch.ones(6) @ w.T],
    ids=["sum", "clone", "list", "bool", "cast", "add", "product"],
)
def test_no_value_of_a_weight_is_given(use):
    lora = two(Asking())
    with lora.mixed_batch(["a", "b"]) as model:
        for layer in (model.body, model.head):
            with pytest.raises(StateError, match="without calling"):
                use(layer.weight)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_large_layers_take_single_precision_and_autocast(autocast: bool):
    lora = adapted(lambda: nn.Sequential(nn.Linear(300, 200)))
    x, rows = torch.randn(5, 20, 300, dtype=torch.float64), ["a", "c", None, "b", "a"]
    with torch.no_grad(), lora.mixed_batch(rows) as model:
        exact = model(x)
    lora.model.float()
    with torch.no_grad(), lora.mixed_batch(rows) as model, torch.autocast("cpu", enabled=autocast):
        mixed = model(x.float())
    assert mixed.dtype == (torch.bfloat16 if autocast else torch.float32)
    # Sums of 300 products keep six digits in float32; in bfloat16, each operand and the result is rounded to three.
    assert (mixed - exact).norm() < (6e-3 if autocast else 1e-6) * exact.norm()


@pytest.mark.parametrize("shape", [(5, 0, 6), (5, 2, 3, 6), (5, 6)], ids=str)
def test_any_number_of_dimensions_may_follow_the_rows(shape: tuple[int, ...]):
    lora = adapted(lambda: nn.Sequential(nn.Linear(6, 4)))
    with torch.no_grad(), lora.mixed_batch(["a", "c", None, "b", "a"]) as model:
        assert model(torch.randn(shape, dtype=torch.float64)).shape == (*shape[:-1], 4)


LAYERS = {
    "linear": (lambda: nn.Linear(6, 8), (5, 3, 6)),
    "linear-rows": (lambda: nn.Linear(6, 8, bias=False), (5, 6)),
    "transformers_conv1d": (lambda: Conv1D(8, 6), (5, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 8, 3), (5, 4, 9)),
    "conv1d-groups": (lambda: nn.Conv1d(4, 8, 3, groups=2), (5, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 8, 3, stride=2), (5, 4, 9, 9)),
    "conv2d-pointwise": (lambda: nn.Conv2d(4, 8, 1), (5, 4, 9, 9)),
    "conv2d-groups": (lambda: nn.Conv2d(4, 8, 3, groups=2), (5, 4, 9, 9)),
    "conv2d-depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), (5, 4, 9, 9)),
    "conv2d-reflect": (lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), (5, 4, 9, 9)),
    "conv2d-groups-reflect": (lambda: nn.Conv2d(4, 8, 3, groups=2, padding=1, padding_mode="reflect"), (5, 4, 9, 9)),
    "timm_conv2d_same": (lambda: Conv2dSame(4, 8, (3, 4), stride=(2, 3)), (5, 4, 9, 8)),
    "timm_conv2d_same-depthwise": (lambda: Conv2dSame(4, 4, 3, stride=2, groups=4), (5, 4, 8, 9)),
    "conv3d": (lambda: nn.Conv3d(4, 8, 2), (5, 4, 5, 5, 5)),
    "conv3d-groups": (lambda: nn.Conv3d(4, 8, 2, groups=2), (5, 4, 5, 5, 5)),
    "deform_conv2d": (Deforms, (5, 4, 8, 9)),
    "deform_conv2d-groups": (lambda: Deforms(groups=2, masked=True), (5, 4, 8, 9)),
    "embedding": (lambda: nn.Embedding(9, 6), (5, 7)),
    "multihead_attention": (Attends, (5, 3, 8)),
    "embedding-one_each": (lambda: nn.Embedding(9, 6, padding_idx=0), (5,)),
}
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""The share of the norm that a few roundings in a type take."""


def test_every_layer_type_that_can_mix_is_here():
    registry = default_registry()
    able = {
        name for name, owned in registry.of(kinds.LAYERS).items() if type(owned.plugin).mixed is not LayerPlugin.mixed
    }
    assert {name.partition("-")[0] for name in LAYERS} == able


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
def test_each_row_is_right_in_every_type(make, shape, dtype, autocast):
    torch.manual_seed(0)
    untouched = nn.Sequential(make()).to(dtype).eval()
    lora = adapted(lambda: copy.deepcopy(untouched), dtype)
    exact = copy.deepcopy(lora.model).double()
    x = torch.randint(9, shape) if isinstance(lora.model[0], nn.Embedding) else torch.randn(shape).to(dtype)
    rows = ["a", "b", None, "c", "a"]
    wide = x.double() if x.is_floating_point() else x
    with torch.no_grad(), torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        try:
            plain = untouched(x)
        except RuntimeError as error:
            pytest.skip(f"torch cannot run the untouched layer: {error}")
        with lora.mixed_batch(rows) as model:
            mixed = model(x)
    with torch.no_grad(), LoraModel(exact).mixed_batch(rows) as model:
        expected = model(wide)
    assert mixed.dtype == plain.dtype
    # Autocast leaves float64 alone, and an embedding in its type.
    rounding = ROUNDING[dtype] if dtype == torch.float64 else max(ROUNDING[dtype], ROUNDING[autocast or dtype])
    assert (mixed.double() - expected).norm() < rounding * expected.norm()
