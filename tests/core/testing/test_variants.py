"""The built-in variant passes the kit, and each check fails on a variant that violates it."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from lora_plugins import ConfigError
from lora_plugins.testing import VARIANT_CHECKS, check_variant_plugin
from lora_plugins.variants.dora import DoraVariant
from tests.core.testing.test_planted_variants import (
    KeepsItsUpdate,
    NoScaling,
    NotFiniteForAZeroRow,
    OnDefaultDevice,
    OnlyRankTwo,
    StartsTwiceAtZero,
    WrongWithoutGradients,
)
from tests.core.testing.violations import assert_found


def test_dora(variant_check):
    variant_check(DoraVariant())


class Unnamed(DoraVariant):
    name = ""


class WrongShape(DoraVariant):
    def first_values(self, weight, A, B, scaling):
        return {"magnitude": super().first_values(weight, A, B, scaling)["magnitude"][None]}


class NotAtTheStart(DoraVariant):
    def first_values(self, weight, A, B, scaling):
        return {"magnitude": torch.ones(len(weight), dtype=weight.dtype)}


class Detached(DoraVariant):
    def delta_weight(self, weight, A, B, scaling, own):
        return super().delta_weight(weight, A, B, scaling, {"magnitude": own["magnitude"].detach()})


class InPlace(DoraVariant):
    def delta_weight(self, weight, A, B, scaling, own):
        update = super().delta_weight(weight, A, B, scaling, own)
        with torch.no_grad():
            weight.mul_(1.001)
        return update


class Remembers(DoraVariant):
    """Its update depends on how often it was computed."""

    def __init__(self) -> None:
        self.calls = 0

    def delta_weight(self, weight: Tensor, A: Tensor, B: Tensor, scaling: float, own: Mapping[str, Tensor]) -> Tensor:
        self.calls += 1
        return super().delta_weight(weight, A, B, scaling, own) * (1 + 1e-3 * self.calls)


class ForgetsWhenCopied(DoraVariant):
    """What it does depends on an attribute that a copy does not have."""

    def __init__(self) -> None:
        self.original = True

    def __deepcopy__(self, memo):
        copy = type(self)()
        copy.original = False
        return copy

    def delta_weight(self, weight, A, B, scaling, own):
        update = super().delta_weight(weight, A, B, scaling, own)
        return update if self.original else 2 * update


class Double(DoraVariant):
    def first_values(self, weight, A, B, scaling):
        return {"magnitude": super().first_values(weight, A, B, scaling)["magnitude"].double()}

    def delta_weight(self, weight, A, B, scaling, own):
        if own["magnitude"].dtype == torch.float32:
            raise TypeError("the magnitude was double")
        return super().delta_weight(weight, A, B, scaling, own)


class AsksForAValue(DoraVariant):
    def delta_weight(self, weight, A, B, scaling, own):
        delta = super().delta_weight(weight, A, B, scaling, own)
        return delta if float(delta.detach().sum()) else delta.clone()

    def row_factors(self, direction, own):
        factors = super().row_factors(direction, own)
        return factors if float(factors.detach().sum()) else factors.clone()


VIOLATIONS = {
    "registration": Unnamed,
    "shapes": WrongShape,
    "identity": NotAtTheStart,
    "gradients": Detached,
    "trainable": StartsTwiceAtZero,
    "scaling": NoScaling,
    "branch": WrongWithoutGradients,
    "zeros": NotFiniteForAZeroRow,
    "ranks": OnlyRankTwo,
    "dtype": Double,
    "pure": KeepsItsUpdate,
    "device": OnDefaultDevice,
    "base": InPlace,
    "merging": Remembers,
    "copies": ForgetsWhenCopied,
    "compile": AsksForAValue,
    "files": ForgetsWhenCopied,
}


def test_every_check_has_a_violation():
    assert list(VIOLATIONS) == list(VARIANT_CHECKS)


@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_violation_fails_its_check(name):
    assert_found(name, lambda: check_variant_plugin(VIOLATIONS[name](), only=[name]))


class LinearOnly(DoraVariant):
    def refusal(self, plugin):
        return None if plugin.name == "linear" else "it serves linear layers only"


class Nothing(DoraVariant):
    def refusal(self, plugin):
        return "it serves nothing"


def test_layers_that_a_variant_refuses_are_left_out():
    check_variant_plugin(LinearOnly(), only=["shapes", "branch"])
    with pytest.raises(ConfigError, match="Nothing refuses all layers of the kit, as the first one: it serves nothing"):
        check_variant_plugin(Nothing())


def test_an_unknown_check_is_refused():
    with pytest.raises(ConfigError, match=r"no check 'merge'.*merging"):
        check_variant_plugin(DoraVariant(), only=["merge"])
