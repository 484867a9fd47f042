"""Defects that an author of a variant may build in: the kit finds each of them, in the check that says so."""

import pytest
import torch

from lora_plugins import VariantPlugin
from lora_plugins.testing import CheckError, check_variant_plugin
from lora_plugins.variants.dora import DoraVariant


class NoScaling(DoraVariant):
    def first_values(self, weight, A, B, scaling):
        return super().first_values(weight, A, B, 1.0)

    def delta_weight(self, weight, A, B, scaling, own):
        return super().delta_weight(weight, A, B, 1.0, own)


class DrawsFromTheProcess(DoraVariant):
    """Noise in training, of a size that no tolerance sees."""

    def delta_weight(self, weight, A, B, scaling, own):
        return super().delta_weight(weight, A, B, scaling, own) + 1e-14 * torch.rand(())


class DrawsFirstValues(DoraVariant):
    def first_values(self, weight, A, B, scaling):
        torch.rand(1)
        return super().first_values(weight, A, B, scaling)


class WrongWithoutGradients(DoraVariant):
    def delta_weight(self, weight, A, B, scaling, own):
        return super().delta_weight(weight, A, B, scaling, own) * (1 if torch.is_grad_enabled() else 1.01)


class KeepsItsUpdate(DoraVariant):
    """Computes an update once for each shape."""

    def __init__(self):
        self.kept = {}

    def __deepcopy__(self, memo):
        return self

    def delta_weight(self, weight, A, B, scaling, own):
        key = (weight.shape, weight.dtype, A.requires_grad)
        if key not in self.kept:
            self.kept[key] = super().delta_weight(weight, A, B, scaling, own).detach()
        fresh = super().delta_weight(weight, A, B, scaling, own)
        return fresh - fresh.detach() + self.kept[key]


class KeepsItsUpdateWithoutGradients(KeepsItsUpdate):
    def delta_weight(self, weight, A, B, scaling, own):
        update = DoraVariant if torch.is_grad_enabled() else KeepsItsUpdate
        return update.delta_weight(self, weight, A, B, scaling, own)


class WritesIntoA(DoraVariant):
    def delta_weight(self, weight, A, B, scaling, own):
        with torch.no_grad():
            A.mul_(1 + 1e-12)
        return super().delta_weight(weight, A, B, scaling, own)


class WritesIntoItsOwn(DoraVariant):
    def delta_weight(self, weight, A, B, scaling, own):
        with torch.no_grad():
            own["magnitude"].clamp_(min=1.0)
        return super().delta_weight(weight, A, B, scaling, own)


class OtherType(DoraVariant):
    def delta_weight(self, weight, A, B, scaling, own):
        return super().delta_weight(weight, A, B, scaling, own).double()


class NotFiniteForAZeroRow(DoraVariant):
    """A layer that starts at zero, as those of ControlNet do, has rows without a direction."""

    def first_values(self, weight, A, B, scaling):
        return {"magnitude": weight.norm(dim=1)}

    def delta_weight(self, weight, A, B, scaling, own):
        direction = weight + scaling * B @ A
        return own["magnitude"][:, None] * direction / direction.detach().norm(dim=1, keepdim=True) - weight


class OnlySquare(DoraVariant):
    """Takes columns for rows, which a part of a fused weight shows."""

    def shapes(self, rows, columns, r):
        return {"magnitude": (max(rows, 5),)}


class OnlyRankTwo(DoraVariant):
    def delta_weight(self, weight, A, B, scaling, own):
        direction = weight + scaling * (torch.outer(B[:, 0], A[0]) + torch.outer(B[:, 1], A[1]))
        return own["magnitude"][:, None] * direction / direction.detach().norm(dim=1, keepdim=True) - weight


class KeepsTensors(DoraVariant):
    kept: list = []  # noqa: RUF012

    def delta_weight(self, weight, A, B, scaling, own):
        self.kept.append(weight)
        return super().delta_weight(weight, A, B, scaling, own)


class DetachedA(DoraVariant):
    def delta_weight(self, weight, A, B, scaling, own):
        return super().delta_weight(weight, A.detach(), B, scaling, own)


class OnDefaultDevice(DoraVariant):
    def delta_weight(self, weight, A, B, scaling, own):
        return super().delta_weight(weight, A, B, scaling, own) * torch.ones(weight.shape, dtype=weight.dtype)


class InFloat32(DoraVariant):
    def delta_weight(self, weight, A, B, scaling, own):
        single = {name: tensor.float() for name, tensor in own.items()}
        return super().delta_weight(weight.float(), A.float(), B.float(), scaling, single).to(weight.dtype)


class OneTensorInFloat32(DoraVariant):
    def delta_weight(self, weight, A, B, scaling, own):
        return super().delta_weight(weight, A, B.float().to(B.dtype), scaling, own)


class OtherGradient(DoraVariant):
    """Differentiates the norm, which row_factors holds constant."""

    def delta_weight(self, weight, A, B, scaling, own):
        direction = weight + scaling * B @ A
        return own["magnitude"][:, None] * direction / direction.norm(dim=1, keepdim=True) - weight


class HalfAGradient(DoraVariant):
    """What is right in delta_weight is wrong in row_factors."""

    def delta_weight(self, weight, A, B, scaling, own):
        return DoraVariant().delta_weight(weight, A, B, scaling, own)

    def row_factors(self, direction, own):
        factors = super().row_factors(direction, own)
        return (factors + factors.detach()) / 2


class Product(VariantPlugin):
    """The update of LoRA, each value times that of a second product, as in LoHa."""

    name = "product"

    def shapes(self, rows, columns, r):
        return {"A2": (r, columns), "B2": (rows, r)}

    def first_values(self, weight, A, B, scaling):
        return {"A2": torch.ones_like(A), "B2": torch.ones_like(B)}

    def delta_weight(self, weight, A, B, scaling, own):
        return scaling * (B @ A) * (own["B2"] @ own["A2"])


class StartsTwiceAtZero(Product):
    """Both products start at zero, and each is the factor of the other's gradient."""

    def first_values(self, weight, A, B, scaling):
        return {"A2": torch.ones_like(A), "B2": torch.zeros_like(B)}


class CountsOnADrawnA(Product):
    """In an embedding, where A starts at zero, both products do."""

    def first_values(self, weight, A, B, scaling):
        return {"A2": A.flip(0), "B2": torch.ones_like(B)}


class KeepsItsFirstA(Product):
    """In the plugin object, which another process does not have."""

    def __init__(self):
        self.kept = {}

    def first_values(self, weight, A, B, scaling):
        self.kept[A.shape] = A.clone()
        return super().first_values(weight, A, B, scaling)

    def delta_weight(self, weight, A, B, scaling, own):
        return super().delta_weight(weight, A + self.kept[A.shape].to(A.dtype), B, scaling, own)


class KeepsItsFirstWeight(Product):
    """For all layers of a shape."""

    def __init__(self):
        self.kept = {}

    def delta_weight(self, weight, A, B, scaling, own):
        return self.kept.setdefault(weight.shape, weight.clone()) * super().delta_weight(weight, A, B, scaling, own)


class KeepsTheLastNorm(Product):
    """In its class, which all plugin objects of the process have."""

    norm = None

    def first_values(self, weight, A, B, scaling):
        type(self).norm = weight.norm()
        return super().first_values(weight, A, B, scaling)

    def delta_weight(self, weight, A, B, scaling, own):
        return self.norm * super().delta_weight(weight, A, B, scaling, own)


class DetachesButInFloat64(Product):
    def delta_weight(self, weight, A, B, scaling, own):
        wide = weight.dtype == torch.float64
        return super().delta_weight(weight, A, B, scaling, own if wide else {**own, "A2": own["A2"].detach()})


class HalvesAGradientButInFloat64(Product):
    def delta_weight(self, weight, A, B, scaling, own):
        wide = weight.dtype == torch.float64
        return super().delta_weight(weight, A, B if wide else (B + B.detach()) / 2, scaling, own)


class HoldsALambda(Product):
    """Which no pickle can hold."""

    def __init__(self):
        self.function = lambda x: x


PLANTED = {
    CountsOnADrawnA: "trainable",
    DrawsFromTheProcess: "pure",
    DrawsFirstValues: "pure",
    KeepsItsUpdateWithoutGradients: "pure",
    WritesIntoA: "pure",
    WritesIntoItsOwn: "pure",
    OtherType: "shapes",
    OnlySquare: "shapes",
    KeepsTensors: "pure",
    KeepsItsFirstWeight: "pure",
    KeepsTheLastNorm: "pure",
    DetachedA: "gradients",
    InFloat32: "dtype",
    OneTensorInFloat32: "dtype",
    DetachesButInFloat64: "dtype",
    HalvesAGradientButInFloat64: "dtype",
    OtherGradient: "gradients",
    HalfAGradient: "gradients",
    HoldsALambda: "copies",
}
"""By defect, the check that is about it. More are in `test_variants`."""


@pytest.mark.slow
def test_nothing_is_found_where_nothing_is_wrong():
    check_variant_plugin(Product())


def test_a_variant_may_refuse_embeddings():
    class ButEmbeddings(CountsOnADrawnA):
        def refusal(self, plugin):
            return "A has to be drawn" if plugin.lookup else None

    check_variant_plugin(ButEmbeddings(), only=["trainable"])


def test_a_refusal_without_a_reason_is_none():
    class RefusesNothing(Product):
        def refusal(self, plugin):
            return ""

    class MisspeltShape(RefusesNothing):
        def shapes(self, rows, columns, r):
            return {**super().shapes(rows, columns, r), "g": (1,)}

    check_variant_plugin(RefusesNothing(), only=["registration", "shapes"])
    with pytest.raises(CheckError, match="on linear fails the check 'shapes'"):
        check_variant_plugin(MisspeltShape(), only=["shapes"])


class OfUnitRows(VariantPlugin):
    """The rows of A are directions, as in DeLoRA: their lengths change nothing."""

    name = "of_unit_rows"

    def shapes(self, rows, columns, r):
        return {"length": (r, 1)}

    def first_values(self, weight, A, B, scaling):
        return {"length": torch.ones(len(A), 1)}

    def delta_weight(self, weight, A, B, scaling, own):
        return scaling * (B @ (own["length"] * A / A.norm(dim=1, keepdim=True).clamp(min=1e-6)))


def test_a_variant_may_use_directions_alone():
    check_variant_plugin(OfUnitRows(), only=["ranks", "dtype", "trainable", "gradients"])


class OfExponents(DoraVariant):
    """Its magnitudes are exponents, so that the graph of row_factors keeps an output of its own."""

    def first_values(self, weight, A, B, scaling):
        return {name: tensor.log() for name, tensor in super().first_values(weight, A, B, scaling).items()}

    def delta_weight(self, weight, A, B, scaling, own):
        return super().delta_weight(weight, A, B, scaling, own)

    def row_factors(self, direction, own):
        return super().row_factors(direction, {"magnitude": own["magnitude"].exp()})


def test_a_variant_may_save_what_its_factors_are_made_of():
    check_variant_plugin(OfExponents(), only=["pure", "gradients"])


def test_what_an_earlier_check_leaves_in_the_plugin_object_is_not_there_elsewhere():
    with pytest.raises(CheckError, match="KeepsItsFirstA on linear fails the check 'files'"):
        check_variant_plugin(KeepsItsFirstA())


@pytest.mark.parametrize("cls", PLANTED, ids=lambda cls: cls.__name__)
def test_a_planted_defect_is_found(cls):
    with pytest.raises(CheckError, match=f"fails the check '{PLANTED[cls]}'"):
        check_variant_plugin(cls(), only=[PLANTED[cls]])


class MisspeltFirstValue(DoraVariant):
    def first_values(self, weight, A, B, scaling):
        return {"lora_magnitude": super().first_values(weight, A, B, scaling)["magnitude"]}


class MissingFirstValue(DoraVariant):
    def shapes(self, rows, columns, r):
        return {**super().shapes(rows, columns, r), "gate": (1,)}


class MissizedFirstValue(DoraVariant):
    def first_values(self, weight, A, B, scaling):
        return {"magnitude": super().first_values(weight, A, B, scaling)["magnitude"][:-1]}


class AsksForAnother(DoraVariant):
    def delta_weight(self, weight, A, B, scaling, own):
        return super().delta_weight(weight, A, B, scaling, own) * own["lora_magnitude"].mean()


@pytest.mark.parametrize("name", ["shapes", "identity", "branch"])
@pytest.mark.parametrize(
    ("cls", "said"),
    [
        (
            MisspeltFirstValue,
            r"gives 'lora_magnitude', and shapes\(\) has none of that name\. Did you mean 'magnitude'",
        ),
        (MissingFirstValue, r"first_values\(\) gives no 'gate'\. There is 'magnitude'"),
        (MissizedFirstValue, r"first_values\(\) gives a 'magnitude' of \(2,\), and shapes\(\) says \(3,\)"),
        (AsksForAnother, r"first_values\(\) gives no 'lora_magnitude'\. Did you mean 'magnitude'"),
    ],
    ids=["given", "missing", "of another size", "asked for"],
)
def test_a_wrong_name_or_size_is_told_with_what_is_announced(cls, said, name):
    with pytest.raises(CheckError, match=said):
        check_variant_plugin(cls(), only=[name])
