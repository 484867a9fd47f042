"""Odd calls: an adapted layer whose update is zero does what the layer itself does, or raises what it raises."""

import copy
import re
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from lora_plugins import LoraConfig, LoraModel
from tests.core.kernels.needs import needs
from tests.slow import thinned

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "small": lambda: nn.Linear(6, 4),
    "no_bias": lambda: nn.Linear(6, 4, bias=False),
    "large": lambda: nn.Linear(1024, 1024),
    "bfloat16": lambda: nn.Linear(1024, 1024).bfloat16(),
    "float64": lambda: nn.Linear(6, 4).double(),
    "no_inputs": lambda: nn.Linear(0, 3),
    "no_outputs": lambda: nn.Linear(6, 0),
    "bias_of_one": lambda: with_bias(nn.Linear(1024, 1024), torch.ones(1)),
    "conv": lambda: nn.Conv2d(3, 4, 3),
    "conv_no_bias": lambda: nn.Conv2d(3, 4, 3, bias=False),
    "pointwise": lambda: nn.Conv2d(3, 4, 1, bias=False),
    "transposed": lambda: nn.ConvTranspose2d(3, 4, 3, bias=False),
}

INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "as_it_should_be": lambda x: x,
    "uint8": lambda x: x.abs().mul(20).byte(),
    "int64": lambda x: x.mul(3).long(),
    "bool": lambda x: x > 0,
    "bfloat16": lambda x: x.bfloat16(),
    "double": lambda x: x.double(),
    "complex": lambda x: x.to(torch.complex64),
    "empty": lambda x: x[:0],
    "one_row": lambda x: x[0],
    "narrow": lambda x: x[..., :-1],
    "no_columns": lambda x: x[..., :0],
    "no_channels": lambda x: x[:, :0],
    "number": lambda x: torch.tensor(1.0, dtype=x.dtype),
    "jagged": lambda x: torch.nested.nested_tensor([x, x[:1]], layout=torch.jagged),
    "sparse": lambda x: x.to_sparse(),
}


def with_bias(layer: nn.Linear, bias: Tensor) -> nn.Linear:
    layer.bias = nn.Parameter(bias)
    return layer


def outcome(layer: nn.Module, x: Tensor, autocast: bool) -> Tensor | str:
    """What a call returns, or what it says, up to names of operations."""
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y: Tensor = layer(x)
    except (RuntimeError, IndexError, NotImplementedError) as error:
        return re.sub(r"\W+", " ", str(error))[:40]
    return y


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:Casting complex values to real:UserWarning")
@thinned(2, make=LAYERS, change=INPUTS, autocast={"plain": False, "autocast": True})
def test_an_odd_call_ends_as_that_of_the_layer_itself(make, change, autocast):
    torch.manual_seed(0)
    layer = make()
    weight = layer.weight
    shape = (64, weight.shape[1]) if isinstance(layer, nn.Linear) else (2, 3, 5, 5)
    x = change(torch.randn(shape).to(weight.dtype))
    plain = outcome(copy.deepcopy(layer), x, autocast)
    model = nn.Sequential(layer)
    LoraModel(model, LoraConfig(r=2, target_modules=["0"]))
    found = outcome(layer, x, autocast)
    if isinstance(plain, str) or isinstance(found, str):
        assert found == plain
        return
    assert found.dtype == plain.dtype
    assert found.layout == plain.layout
    found, plain = (y.values() if y.is_nested else y for y in (found, plain))
    torch.testing.assert_close(found, plain, rtol=0.02 if found.dtype == torch.bfloat16 else 1e-4, atol=1e-2)


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("make", [LAYERS["small"], LAYERS["conv"]], ids=["linear", "conv"])
def test_a_bias_may_change_before_the_backward(make, variant):
    torch.manual_seed(0)
    layer = make()
    model = nn.Sequential(layer)
    LoraModel(model, LoraConfig(r=2, target_modules=["0"], init="none", variant=variant))
    x = torch.randn((5, 6) if isinstance(layer, nn.Linear) else (2, 3, 5, 5))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(model(x).square().sum(), trained)
    loss = model(x).square().sum()
    with torch.no_grad():
        layer.bias.add_(1)
    torch.testing.assert_close(torch.autograd.grad(loss, trained), expected)


@pytest.mark.parametrize("fields", [{}, {"memory": "low"}, {"variant": "dora"}], ids=["plain", "low_memory", "dora"])
@pytest.mark.parametrize("make", [LAYERS["small"], LAYERS["conv"]], ids=["linear", "conv"])
def test_gradients_that_are_switched_on_in_inference_mode_are_ignored(make, fields):
    torch.manual_seed(0)
    layer = make()
    model = nn.Sequential(layer)
    LoraModel(model, LoraConfig(r=2, target_modules=["0"], init="none", **fields))
    with torch.inference_mode():
        x = torch.randn((5, 6) if isinstance(layer, nn.Linear) else (2, 3, 5, 5))
        expected = model(x)
        with torch.enable_grad():
            found = model(x)
    assert not found.requires_grad
    assert torch.equal(found, expected)


def one_window(image: Tensor) -> Tensor:
    """Cuts an image into windows, of which there is one, as mobile transformers do, and puts it together again."""
    windows = image.view(1, 8, 1, 2, 1, 2).permute(0, 3, 5, 2, 4, 1).contiguous().view(1, 4, 1, 8)
    return windows.view(1, 2, 2, 1, 1, 8).permute(0, 5, 3, 1, 4, 2).reshape(1, 8, 2, 2)


def batch_inside(image: Tensor) -> Tensor:
    """Gives an image the memory of a sequence of positions, and its own dimensions."""
    return image.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)


class BehindViews(nn.Module):
    """A normalization, views, and a layer that changes the channels of each position."""

    def __init__(self, view: Callable[[Tensor], Tensor], layer: nn.Module) -> None:
        super().__init__()
        self.norm, self.view, self.layer = nn.BatchNorm2d(8), view, layer

    def forward(self, x: Tensor) -> Tensor:
        image = self.view(self.norm(x))
        if isinstance(self.layer, nn.Linear):
            return self.layer(image.movedim(1, -1)).movedim(-1, 1)
        return self.layer(image)


@pytest.mark.parametrize("fields", [{}, {"memory": "low"}, {"variant": "dora"}], ids=["plain", "low_memory", "dora"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("make", [lambda: nn.Conv2d(8, 8, 1), lambda: nn.Linear(8, 8)], ids=["pointwise", "linear"])
@pytest.mark.parametrize("view", [one_window, batch_inside], ids=["one_window", "batch_inside"])
def test_a_normalization_before_views_gets_the_gradient_of_torch(view, make, training, fields):
    plain = BehindViews(view, make()).double()
    adapted = copy.deepcopy(plain)
    LoraModel(adapted, LoraConfig(r=2, target_modules=["layer"], norm="track", **fields))
    x = torch.randn(1, 8, 2, 2, dtype=torch.float64, requires_grad=True)
    gradients = []
    for model in (plain, adapted):
        model.train(training)
        (gradient,) = torch.autograd.grad(model(x).sin().sum(), x)
        gradients.append(gradient)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def last(layer: nn.Module) -> nn.Module:
    return layer.to(memory_format=torch.channels_last)


FORMATS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "pointwise": (lambda: last(nn.Conv2d(8, 4, 1)), torch.ones(2, 8, 3, 5)),
    "pointwise-grouped": (lambda: last(nn.Conv2d(8, 4, 1, groups=2)), torch.ones(2, 8, 3, 5)),
    "depthwise": (lambda: last(nn.Conv2d(8, 8, 3, groups=8)), torch.ones(2, 8, 3, 5)),
    "one_channel": (lambda: last(nn.Conv2d(1, 4, 3)), torch.ones(2, 1, 3, 5)),
    "reflected": (lambda: last(nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect")), torch.ones(1, 1, 3, 5)),
    "transposed_convolution": (lambda: nn.ConvTranspose2d(8, 8, 1, groups=8), torch.ones(2, 1, 1, 8).movedim(-1, 1)),
    "linear-by_columns": (lambda: nn.Linear(8, 4), torch.ones(1, 8, 5).mT),
}


def several(model: nn.Module) -> None:
    config = LoraConfig(r=2, target_modules=["0"], init="none", dropout=0.3)
    lora = LoraModel(model, config)
    lora.add_adapter("second", config)
    lora.set_adapter(["default", "second"])


ADAPTED: dict[str, Callable[[nn.Module], object]] = {
    "one": lambda model: LoraModel(model, LoraConfig(r=2, target_modules=["0"], init="none")),
    "dropout": lambda model: LoraModel(model, LoraConfig(r=2, target_modules=["0"], init="none", dropout=0.3)),
    "dora": lambda model: LoraModel(model, LoraConfig(r=2, target_modules=["0"], init="none", variant="dora")),
    "several": several,
}


@pytest.mark.parametrize(
    "adapt",
    # The law alone, without a kernel, is computed in formats of its own.
    [pytest.param(each, marks=needs("fused_conv") if name == "one" else (), id=name) for name, each in ADAPTED.items()],
)
@pytest.mark.parametrize(("make", "x"), FORMATS.values(), ids=FORMATS)
def test_outputs_and_gradients_have_the_format_of_torch(make, x, adapt):
    model = nn.Sequential(make())
    if adapt is ADAPTED["dora"] and isinstance(model[0], nn.ConvTranspose2d):
        pytest.skip("rows of its matrix are no outputs")
    x = x.clone().requires_grad_()
    strides = []
    for change in (None, adapt):
        if change is not None:
            change(model)
        output = model(x)
        (gradient,) = torch.autograd.grad(output.sum(), x)
        strides.append((output.stride(), gradient.stride()))
    assert strides[0] == strides[1]


@pytest.mark.parametrize(("make", "x"), [FORMATS[name] for name in ("pointwise", "depthwise")], ids=["1x1", "3x3"])
def test_a_mixed_batch_has_the_format_of_torch(make, x):
    model = nn.Sequential(make()).eval()
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    strides = []
    for adapted in (False, True):
        lora = LoraModel(model, LoraConfig(r=2, target_modules=["0"], init="none")) if adapted else None
        with nullcontext() if lora is None else lora.mixed_batch(["default"] * len(x)):
            output = model(x)
        (gradient,) = torch.autograd.grad(output.sum(), x)
        strides.append((output.stride(), gradient.stride()))
    assert strides[0] == strides[1]


@pytest.mark.parametrize(
    "change", [lambda saved: saved, torch.clone, Tensor.contiguous], ids=["kept", "copied", "rows"]
)
@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("inputs", [1, 8], ids=["one_column", "columns"])
def test_the_gradient_of_columns_has_the_format_of_torch_whatever_hooks_make_of_them(inputs, variant, change):
    model = nn.Sequential(nn.Linear(inputs, 4))
    x = torch.randn(inputs, 5).T.requires_grad_()
    strides = []
    for adapted in (False, True):
        if adapted:
            LoraModel(model, LoraConfig(r=2, target_modules=["0"], variant=variant))
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: change(tensor.detach()), lambda kept: kept):
            output = model(x)
        strides.append(torch.autograd.grad(output.sum(), x)[0].stride())
    assert strides[0] == strides[1]


def cast(model: nn.Module) -> None:
    model.float()


def replace_values(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora" not in name:
            parameter.data = 3 * parameter.data


@pytest.mark.parametrize("change", [cast, replace_values])
def test_a_backward_is_that_of_the_weights_of_its_forward(change):
    """As a model that runs in another type, and is cast back ahead of the backward, has it of torch's own layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double().requires_grad_(False)
    plain, x = copy.deepcopy(model), torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    LoraModel(model, LoraConfig(r=2, target_modules="all"))
    found = []
    for each in (model, plain):
        output = each(x)
        change(each)
        found += torch.autograd.grad(output.square().sum(), x)
    torch.testing.assert_close(*found, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dropout", [0.0, 1e-9], ids=["plain", "dropout"])
@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        pytest.param(LAYERS["float64"], (5, 6), marks=needs("fused_linear", "fused_rescaled"), id="linear"),
        pytest.param(
            lambda: nn.Conv2d(3, 4, 3).double(), (2, 3, 5, 5), marks=needs("fused_conv", "fused_rescaled"), id="conv"
        ),
    ],
)
def test_other_values_of_a_weight_change_no_backward_of_before(make, shape, variant, dropout):
    model, x = nn.Sequential(make()), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    LoraModel(model, LoraConfig(r=2, target_modules="all", init="none", variant=variant, dropout=dropout))
    found = []
    for change in (lambda _: None, replace_values):
        torch.manual_seed(0)
        output = model(x)
        change(model)
        found += torch.autograd.grad(output.square().sum(), x)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        pytest.param(LAYERS["small"], (64, 6), marks=needs("fused_linear", "fused_rescaled"), id="linear"),
        pytest.param(LAYERS["conv"], (2, 3, 9, 9), marks=needs("fused_conv", "fused_rescaled"), id="conv"),
    ],
)
def test_autocast_around_a_backward_rounds_nothing(make, shape, variant, dtype):
    """As where a part of a model switches autocast off, and the backward is called within the block as well."""
    torch.manual_seed(0)
    model = nn.Sequential(make()).to(dtype)
    LoraModel(model, LoraConfig(r=2, target_modules=["0"], init="none", variant=variant))
    x = torch.randn(shape).to(dtype).requires_grad_()
    wanted = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    found = []
    for enabled in (False, True):
        loss = model(x).square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(torch.autograd.grad(loss, wanted))
    torch.testing.assert_close(*found, rtol=0, atol=0)
