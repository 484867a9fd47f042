"""Own forwards that read the weight of the base, and those that read none."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from lora_plugins import LoraConfig, LoraModel, StateError


class ByParameters(nn.Linear):
    """As in torchmeta."""

    def forward(self, x, params=None):
        params = dict(self.named_parameters()) if params is None else params
        return linear(x, params["weight"], params["bias"])


class ByReference(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.kept = [self.weight]

    def forward(self, x):
        return linear(x, self.kept[0], self.bias)


@pytest.mark.parametrize("cls", [ByParameters, ByReference])
def test_forward_that_reads_the_weight_of_the_base_is_refused(cls):
    model, x = nn.Sequential(nn.Linear(4, 4), cls(4, 3)), torch.randn(2, 4)
    lora = LoraModel(model, LoraConfig(r=2))
    with pytest.raises(StateError, match=rf"'1' \({cls.__name__}\) computes without reading 'weight'.* exclude"):
        model(x)
    with lora.disable_adapter():
        base = model(x)
    assert torch.equal(lora.unload()(x), base)


class InPart(nn.Linear):
    """Has a part that is compiled."""

    @torch.compile(backend="eager")
    def part(self, x):
        return linear(x, self.weight)

    def forward(self, x):
        return self.part(x) + self.bias


def test_weight_that_a_compiled_part_of_a_forward_reads():
    model, x = nn.Sequential(InPart(4, 3)), torch.randn(2, 4)
    LoraModel(model, LoraConfig(r=2, init="none"))
    for _ in range(2):
        torch.testing.assert_close(model(x), linear(x, model[0].weight, model[0].bias))


class WithCheckpoint(nn.Linear):
    """Has a part that is computed again in the backward, which torch does not compile here."""

    def part(self, x):
        return linear(x, self.weight)

    def forward(self, x):
        return checkpoint(self.part, x, use_reentrant=False) + self.bias


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at each tensor
def test_weight_that_a_part_of_a_compiled_forward_reads_uncompiled():
    model, x = nn.Sequential(WithCheckpoint(4, 3)), torch.randn(2, 4)
    LoraModel(model, LoraConfig(r=2, init="none"))
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), linear(x, model[0].weight, model[0].bias))


class OfSomething(nn.Linear):
    """Layers for detection give an empty output for an empty input by themselves."""

    without = staticmethod(lambda x: x[:0])

    def forward(self, x):
        return super().forward(x) if len(x) else x.new_zeros(0, self.out_features)


class Dropped(nn.Linear):
    """Does nothing to one row."""

    without = staticmethod(lambda x: x[:1])

    def forward(self, x):
        return super().forward(x) if len(x) > 1 else x


@pytest.mark.parametrize("cls", [OfSomething, Dropped])
def test_a_call_that_needs_no_weight(cls):
    model, x = nn.Sequential(cls(4, 4)), torch.randn(2, 4)
    LoraModel(model, LoraConfig(r=2, target_modules="all", init="none"))
    assert model(cls.without(x)).shape == cls.without(x).shape
    torch.testing.assert_close(model(x), linear(x, model[0].weight, model[0].bias))


class AfterAnEmptyOne(nn.Linear):
    def forward(self, x):
        return linear(x, self._parameters["weight"]) if len(x) else x


def test_readings_of_the_base_are_found_in_a_later_call():
    model = nn.Sequential(AfterAnEmptyOne(4, 3))
    LoraModel(model, LoraConfig(r=2, target_modules="all"))
    model(torch.randn(0, 4))
    with pytest.raises(StateError, match=r"'0' \(AfterAnEmptyOne\) computes without reading 'weight'"):
        model(torch.randn(2, 4))


def test_calls_without_adapters_say_nothing_of_those_with_some():
    model, x = nn.Sequential(ByParameters(4, 3)).eval(), torch.randn(2, 4)
    base = model(x)
    lora = LoraModel(model, LoraConfig(r=2, target_modules="all", init="none"))
    with lora.disable_adapter():
        assert torch.equal(model(x), base)
    lora.merge_adapter()
    torch.testing.assert_close(model(x), linear(x, model[0].weight, model[0].bias))
    lora.unmerge_adapter()
    with pytest.raises(StateError, match=r"'0' \(ByParameters\) computes without reading 'weight'"):
        model(x)


class KeepsItsKernel(nn.Linear):
    """Computes a kernel in `eval()`, as steerable convolutions do."""

    def train(self, mode=True, *, keep=True):
        super().train(mode)
        self.kernel = None if mode or not keep else 2 * self.weight.detach()
        return self

    def forward(self, x):
        return linear(x, 2 * self.weight if self.kernel is None else self.kernel, self.bias)


class KeepsTheFirst(KeepsItsKernel):
    def train(self, mode=True, **keep):
        return super().train(mode, **keep) if mode or self.training else self


@pytest.mark.parametrize("cls", [KeepsItsKernel, KeepsTheFirst])
def test_a_kernel_that_is_kept_for_eval_mode_is_that_of_the_adapter(cls):
    model, x = nn.Sequential(cls(4, 3)), torch.randn(2, 4)
    LoraModel(model, LoraConfig(r=2, init="none"))
    torch.testing.assert_close(model.eval().eval()(x), linear(x, 2 * model[0].weight, model[0].bias))


def test_train_of_a_layer_is_given_what_it_takes():
    model = nn.Sequential(KeepsItsKernel(4, 3))
    LoraModel(model, LoraConfig(r=2, init="none"))
    assert model[0].train(False, keep=False).kernel is None


def test_a_kernel_that_was_kept_before_is_refused_until_it_is_computed_again():
    model, x = nn.Sequential(KeepsItsKernel(4, 3)).eval(), torch.randn(2, 4)
    LoraModel(model, LoraConfig(r=2, init="none"))
    with pytest.raises(StateError, match=r"call train\(\) and eval\(\) of the model again"):
        model(x)
    torch.testing.assert_close(model.train().eval()(x), linear(x, 2 * model[0].weight, model[0].bias))


class KeepsItsWeight(nn.Linear):
    """Computes in training with what `train()` has read as well, which no step changes."""

    def train(self, mode=True):
        super().train(mode)
        self.kept = self.weight.detach()
        return self

    def forward(self, x):
        return linear(x, self.kept, self.bias)


def test_what_train_has_read_for_training_is_no_reading_of_a_forward():
    model, x = nn.Sequential(KeepsItsWeight(4, 3)), torch.randn(2, 4)
    LoraModel(model, LoraConfig(r=2, init="none"))
    torch.testing.assert_close(model.eval()(x), linear(x, model[0].weight, model[0].bias))
    with pytest.raises(StateError, match=r"'0' \(KeepsItsWeight\) computes without reading 'weight'"):
        model.train()(x)


class MasksItself(nn.Linear):
    def train(self, mode=True):
        with torch.no_grad():
            self.weight *= 0.5
        return super().train(mode)


def test_what_train_writes_into_a_weight_is_not_lost_without_a_word():
    model = nn.Sequential(MasksItself(4, 3))
    LoraModel(model, LoraConfig(r=2, init="none"))
    with pytest.raises(TypeError, match="cannot assign"):
        model.eval()
