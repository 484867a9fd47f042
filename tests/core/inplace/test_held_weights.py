"""Layers whose own forward writes into its weight compute with what they wrote."""

import copy
import inspect
from threading import Event, Thread, current_thread

import pytest
import torch
from packaging.version import Version
from torch import nn
from torch.nn.functional import linear, normalize

from lora_plugins import LoraConfig, LoraModel, StateError


class Masked(nn.Conv2d):
    """As in compressai and PixelCNN."""

    def __init__(self):
        super().__init__(2, 3, 3, padding=1)
        self.register_buffer("mask", torch.ones_like(self.weight))
        self.mask[:, :, 1:, 1:] = 0

    def forward(self, x):
        self.weight.data = self.weight.data * self.mask
        return super().forward(x)


class MaskedInPlace(Masked):
    def forward(self, x):
        self.weight.data *= self.mask
        return nn.Conv2d.forward(self, x)


class MaskedByMethod(Masked):
    def forward(self, x):
        self.apply_mask()
        return nn.Conv2d.forward(self, x)

    def apply_mask(self):
        self.weight.data.mul_(self.mask)


class Bounded(nn.Conv2d):
    """As in EEGNet."""

    def __init__(self):
        super().__init__(2, 3, 3, padding=1)

    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.3)
        return super().forward(x)


class Prototypes(nn.Linear):
    """Reads its weight for the first time where no gradients are recorded."""

    def __init__(self):
        super().__init__(5, 3)

    def forward(self, x):
        with torch.no_grad():
            self.weight.copy_(normalize(self.weight))
        return linear(x, self.weight, self.bias)


class ByIndex(Masked):
    def forward(self, x):
        with torch.no_grad():
            self.weight[self.mask == 0] = 0
        return super(Masked, self).forward(x)


class ByAssignment(Masked):
    def forward(self, x):
        with torch.no_grad():
            self.weight *= self.mask
        return super(Masked, self).forward(x)


class IntoAnOutput(Masked):
    def forward(self, x):
        with torch.no_grad():
            torch.mul(self.weight, self.mask, out=self.weight)
        return super(Masked, self).forward(x)


class UnderAnotherName(Masked):
    def forward(self, x):
        own = self.weight
        own.data.mul_(self.mask)
        return super(Masked, self).forward(x)


def masked_by(weight, mask):
    with torch.no_grad():
        weight.mul_(mask)


class ByAFunction(Masked):
    def forward(self, x):
        masked_by(getattr(self, "weight"), self.mask)  # noqa: B009  # so that no code names what is written into
        return super(Masked, self).forward(x)


class CallsItself(Masked):
    def forward(self, x, again=True):
        self.weight.data *= self.mask
        return self.forward(super().forward(x)[:, :2], again=False) if again else super().forward(x)


class Fails(Masked):
    def forward(self, x):
        self.weight.data *= self.mask
        return super().forward(x[:, :1] if x.isnan().any() else x)


CLASSES = [
    Masked,
    MaskedInPlace,
    MaskedByMethod,
    Bounded,
    Prototypes,
    ByIndex,
    ByAssignment,
    IntoAnOutput,
    UnderAnotherName,
    ByAFunction,
    CallsItself,
    Fails,
]


class Generated(nn.Conv2d):
    """Computes its weight from its input, as what is no parameter."""

    def __init__(self, hold):
        super().__init__(2, 3, 3, padding=1, dtype=torch.float64)
        self.kernel = nn.Parameter(self.weight.detach().clone(), requires_grad=False)
        del self.weight
        hold(self, "weight", self.kernel.clone())

    def forward(self, x):
        self.weight = self.kernel * x.mean()
        return super().forward(x)


class ReadsBefore(Generated):
    def forward(self, x):
        assert self.weight.shape == self.kernel.shape
        return super().forward(x)


class AssignsTwice(Generated):
    def forward(self, x):
        self.weight = -self.kernel
        first = super(Generated, self).forward(x)
        return first.square() + super().forward(x)


class AssignsAfter(Generated):
    """Each call computes with the weight of the one before."""

    def forward(self, x):
        output = super(Generated, self).forward(x)
        self.weight = self.kernel * x.mean()
        return output


HOLDS = {"a buffer": nn.Module.register_buffer, "an attribute": setattr}
GENERATED = [Generated, ReadsBefore, AssignsTwice, AssignsAfter]


def build(cls):
    torch.manual_seed(0)
    model = nn.Sequential(cls()).double()
    x = torch.randn(2, 5) if cls is Prototypes else torch.randn(2, 2, 6, 6)
    model(x.double())  # so that the base has what its forward makes of it
    return model, x.double()


def adapted(model):
    lora = LoraModel(model, LoraConfig(r=2))
    nn.init.normal_(model[0].lora_B["default"])
    return lora


def by_hand(plain, lora):
    """The untouched layer with the weight that the adapted one means."""
    (layer,) = lora.plans["default"].layers
    A, B = (getattr(lora.model[0], slot)["default"].detach() for slot in ("lora_A", "lora_B"))
    model = copy.deepcopy(plain)
    model[0].weight.data += layer.scaling * (B @ A).reshape(model[0].weight.shape)
    return model, A, B, layer.scaling


@pytest.mark.parametrize("cls", CLASSES)
def test_forward_and_gradients_are_those_of_the_untouched_layer(cls):
    model, x = build(cls)
    plain = copy.deepcopy(model)
    lora = adapted(model)
    expected, A, B, scaling = by_hand(plain, lora)
    outputs = [each(x) for each in (model, expected)]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-14)
    for output in outputs:
        output.square().sum().backward()
    gradient = scaling * expected[0].weight.grad.flatten(1)
    torch.testing.assert_close(model[0].lora_B["default"].grad, gradient @ A.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model[0].lora_A["default"].grad, B.T @ gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cls", CLASSES)
def test_without_gradients_merged_and_unloaded(cls):
    model, x = build(cls)
    plain = copy.deepcopy(model)
    lora = adapted(model)
    expected, *_ = by_hand(plain, lora)
    with torch.no_grad():
        wanted = expected(x)
        torch.testing.assert_close(model(x), wanted, rtol=0, atol=1e-14)
        lora.merge_adapter()
        torch.testing.assert_close(model(x), wanted, rtol=0, atol=1e-14)
        lora.unmerge_adapter()
    whole = by_hand(plain, lora)[0][0].weight  # nothing of a call is left
    torch.testing.assert_close(model[0].weight, whole, rtol=0, atol=1e-14)
    lora.unload()
    assert torch.equal(model[0].weight, plain[0].weight)
    assert vars(model[0]).keys() == vars(plain[0]).keys()


@pytest.mark.parametrize("hold", HOLDS.values(), ids=HOLDS)
@pytest.mark.parametrize("cls", GENERATED)
def test_a_weight_that_a_forward_assigns_is_updated_from_then_on(cls, hold):
    torch.manual_seed(0)
    model = nn.Sequential(cls(hold))
    expected = copy.deepcopy(model)
    lora = adapted(model)
    A, B = factors = [factor["default"] for factor in (model[0].lora_A, model[0].lora_B)]

    def with_update(x, weight, bias):
        update = lora.plans["default"].layers[0].scaling * (B @ A).view_as(weight)
        return nn.Conv2d._conv_forward(expected[0], x, weight + update, bias)

    expected[0]._conv_forward = with_update
    for x in torch.rand(3, 1, 2, 6, 6, dtype=torch.float64):
        outputs = model(x), expected(x)
        torch.testing.assert_close(*outputs, rtol=0, atol=1e-13)
        gradients = [torch.autograd.grad(output.square().sum(), factors) for output in outputs]
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("hold", HOLDS.values(), ids=HOLDS)
def test_a_weight_that_is_merged_is_not_assigned_another_value(hold):
    torch.manual_seed(0)
    model, x = nn.Sequential(Generated(hold)).eval(), torch.rand(1, 2, 6, 6, dtype=torch.float64)
    lora = adapted(model)
    with torch.no_grad():
        wanted = model(x)
        lora.merge_adapter()
        torch.testing.assert_close(model(x), wanted, rtol=0, atol=1e-14)  # which assigns the same value
        with pytest.raises(StateError, match=r"'weight' of '0' is no parameter, and was assigned another value"):
            model(2 * x)
        lora.unmerge_adapter()
        assert torch.equal(model(x), wanted)


NO_WEIGHTS = {"no values": torch.empty(3, 2, 3, 3, device="meta"), "another shape": torch.zeros(1), "none": None}


class Standardized(Generated):
    def forward(self, x):
        self.weight = (self.kernel - self.kernel.mean()) / self.kernel.std()
        return super(Generated, self).forward(x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("hold", HOLDS.values(), ids=HOLDS)
def test_a_model_that_computes_a_weight_is_cast_when_it_is_merged(hold, dtype):
    """What it computes then is another value by rounding, which is no reason to refuse it."""
    torch.manual_seed(0)
    model, x = nn.Sequential(Standardized(hold)).eval(), torch.rand(1, 2, 6, 6, dtype=torch.float64)
    lora = adapted(model)
    with torch.no_grad():
        wanted = model(x)
        lora.merge_adapter()
        found = model.to(dtype)(x.to(dtype))
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("value", NO_WEIGHTS.values(), ids=NO_WEIGHTS)
@pytest.mark.parametrize("hold", HOLDS.values(), ids=HOLDS)
def test_a_weight_that_is_merged_is_not_assigned_what_has_no_such_values(hold, value):
    model = nn.Sequential(Generated(hold))
    adapted(model).merge_adapter()
    with pytest.raises(StateError, match="was assigned another value while an adapter is merged"):
        model[0].weight = value


def test_signature_is_that_of_the_class():
    model, _ = build(CallsItself)
    adapted(model)
    assert inspect.signature(model[0].forward) == inspect.signature(CallsItself().forward)


@pytest.mark.parametrize("cls", [ByIndex, ByAssignment, ByAFunction, Prototypes])
def test_compiled_in_one_graph(cls):
    model, x = build(cls)
    adapted(model)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    for each in (model, compiled):
        each(x).square().sum().backward()
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-14)
    gradients = [each.get_parameter("0.lora_B.default").grad for each in (model, compiled._orig_mod)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


not_before_2_9 = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.9"), reason="the compiler of torch 2.8 recurses without end here"
)


class PartAssigns(Masked):
    """Has a part that torch does not compile, which writes into the weight and assigns it."""

    @torch.compiler.disable
    def apply_mask(self):
        with torch.no_grad():
            self.weight *= self.mask

    def forward(self, x):
        self.apply_mask()
        return super(Masked, self).forward(x)


class PartGenerates(Generated):
    """Reads its weight, and has a part that torch does not compile, which assigns another one."""

    def __init__(self):
        super().__init__(setattr)

    @torch.compiler.disable
    def generate(self, x):
        self.weight = self.kernel * x.mean()

    def forward(self, x):
        first = super(Generated, self).forward(x)
        self.generate(x)
        return first + super(Generated, self).forward(x)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at each tensor
@pytest.mark.parametrize("cls", [PartAssigns, pytest.param(PartGenerates, marks=not_before_2_9)])
def test_a_weight_that_an_uncompiled_part_of_a_compiled_forward_assigns(cls):
    model, x = build(cls)
    adapted(model)
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    torch.testing.assert_close(compiled(2 * x), model(2 * x), rtol=1e-12, atol=1e-12)


def test_nothing_is_held_after_a_forward_that_failed():
    model, x = build(Fails)
    lora = adapted(model)
    with pytest.raises(RuntimeError):
        model(x * torch.nan)
    nn.init.zeros_(model[0].lora_B["default"])
    with lora.disable_adapter():
        base = model(x)
    assert torch.equal(model(x), base)


class Waiting(Masked):
    """Lets others do something between writing and reading."""

    def forward(self, x):
        self.weight.data *= self.mask
        self.wait()
        return nn.Conv2d.forward(self, x)


def test_threads_write_into_weights_of_their_own():
    """The second call begins inside of the first one, and reads when that has ended."""
    model = nn.Sequential(Waiting()).eval()
    LoraModel(model, LoraConfig(r=2, init="none", target_modules="all"))
    x, written, written_twice = torch.randn(1, 2, 4, 4), Event(), Event()
    model[0].wait = lambda: None
    expected = model(x)
    first = Thread(target=lambda: model(x))

    def wait():
        if current_thread() is first:
            written.set()
            written_twice.wait(10)
        else:
            written_twice.set()
            first.join(10)

    model[0].wait = wait
    first.start()
    written.wait(10)
    assert torch.equal(model(x), expected)
