"""The built-in storages pass the kit, and each check fails on a storage that violates it."""

from typing import ClassVar

import pytest
import torch

from lora_plugins import StoragePlugin
from lora_plugins.storages.int8 import Int8Storage
from lora_plugins.storages.nf4 import NF4Storage
from lora_plugins.testing import STORAGE_CHECKS, CheckError, check_storage_plugin
from tests.core.testing.violations import assert_found


@pytest.mark.parametrize("options", [{}, {"double_quant": False, "block_size": 32}], ids=["double", "single"])
@pytest.mark.parametrize("plugin", [NF4Storage(), Int8Storage()], ids=lambda plugin: plugin.name)
def test_built_in(storage_check, plugin, options):
    storage_check(plugin, options=options)


@pytest.mark.parametrize("plugin", [NF4Storage(), Int8Storage()], ids=lambda plugin: plugin.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_weights_are_float32_whatever_the_default_type_is(plugin, dtype):
    torch.set_default_dtype(dtype)
    try:
        check_storage_plugin(plugin)
    finally:
        torch.set_default_dtype(torch.float32)


class Unnamed(NF4Storage):
    name = ""


class OwnMinSize(NF4Storage):
    options: ClassVar = {**NF4Storage.options, "min_size": 1}


class TakenName(NF4Storage):
    def store(self, weight, options):
        return {"training": super().store(weight, options)["codes"]}


class FloatingCodes(NF4Storage):
    def store(self, weight, options):
        return {name: tensor.float() for name, tensor in super().store(weight, options).items()}


class Shifted(NF4Storage):
    def restore(self, tensors, shape, options):
        return super().restore(tensors, shape, options).flatten().roll(1).view(shape)


class Half(NF4Storage):
    def restore(self, tensors, shape, options):
        return super().restore(tensors, shape, options).half()


class Flushes(Int8Storage):
    def store(self, weight, options):
        return super().store(torch.where(weight.abs() < 1e-3, 0, weight), options)


class Clamps(Int8Storage):
    def store(self, weight, options):
        return super().store(weight.clamp(-1e3, 1e3), options)


class ScaleOfTheFirstRow(Int8Storage):
    def store(self, weight, options):
        largest = weight[0].abs().max() * 2
        return super().store(weight.clamp(-largest, largest), options)


class Shift(Int8Storage):
    def restore(self, tensors, shape, options):
        return super().restore(tensors, shape, options) + 1e-3


class HalfScales(Int8Storage):
    def store(self, weight, options):
        return super().store(weight * 1e2, {**options, "double_quant": False})

    def restore(self, tensors, shape, options):
        return super().restore({**tensors, "scales": tensors["scales"].half().float()}, shape, options) / 1e2


class Noisy(NF4Storage):
    def store(self, weight, options):
        return super().store(weight + torch.randn_like(weight) * 1e-2, options)


class InPlace(NF4Storage):
    def store(self, weight, options):
        return super().store(weight.mul_(0.99), options)


class View(Int8Storage):
    def store(self, weight, options):
        return {"codes": weight.view(torch.int32)}

    def restore(self, tensors, shape, options):
        return tensors["codes"].view(torch.float32)


class ChangesOptions(NF4Storage):
    options = {**NF4Storage.options, "seen": []}  # noqa: RUF012

    def store(self, weight, options):
        options["seen"].append(weight.shape)
        return super().store(weight, options)


class SetsAnOption(NF4Storage):
    options: ClassVar = {**NF4Storage.options, "blocks": 0}

    def store(self, weight, options):
        options["blocks"] = weight.numel() // options["block_size"]
        return super().store(weight, options)


class TransposedSquare(NF4Storage):
    """Takes the columns of a square weight for its rows, consistently."""

    def restore(self, tensors, shape, options):
        dense = super().restore(tensors, shape, options)
        return dense.T if len(shape) == 2 and shape[0] == shape[1] else dense


class KeepsTheDenseWeight(NF4Storage):
    """By the address of its codes, which another weight may have later."""

    def __init__(self):
        super().__init__()
        self.kept = {}

    def restore(self, tensors, shape, options):
        key = (tensors["codes"].data_ptr(), tensors["codes"]._version)
        if key not in self.kept:
            self.kept[key] = super().restore(tensors, shape, options)
        return self.kept[key].view(shape).clone()


class KeepsScales(Int8Storage):
    """In the plugin object, by the shape of the weight."""

    def __init__(self):
        super().__init__()
        self.kept = {}

    def store(self, weight, options):
        self.kept[weight.shape] = stored = super().store(weight, options)
        return {"codes": stored["codes"]}

    def restore(self, tensors, shape, options):
        return super().restore({**self.kept[shape], **tensors}, shape, options)


class LearnsItsRange(Int8Storage):
    """From the weights that it sees, one after another."""

    largest = torch.zeros(())

    def store(self, weight, options):
        self.largest = torch.maximum(self.largest, weight.abs().max())
        return super().store(weight.clamp(-self.largest / 2, self.largest / 2), options)


class HalfMaxima(NF4Storage):
    def store(self, weight, options):
        stored = super().store(weight, {**options, "double_quant": False})
        return {**stored, "scales": stored["scales"].half()}

    def restore(self, tensors, shape, options):
        tensors = {**tensors, "scales": tensors["scales"].float()}
        return super().restore(tensors, shape, {**options, "double_quant": False})


class BlocksInAByte(Int8Storage):
    """Counts blocks in eight bits, so that those behind the 256th are the first ones again."""

    def restore(self, tensors, shape, options):
        dense, size = super().restore(tensors, shape, options), 256 * options["block_size"]
        return dense.flatten()[torch.arange(shape.numel()) % size].view(shape)


class ClampedZero(StoragePlugin):
    """Unsigned codes whose zero is one of them, also where no weight of a row is near zero."""

    name = "clamped"

    def store(self, weight, options):
        rows = weight.reshape(len(weight), -1)
        low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
        scales = torch.where(high == low, 1, (high - low) / 255)
        zeros = (-low / scales).round().clamp(0, 255)
        codes = (rows / scales + zeros).round().clamp(0, 255)
        return {"codes": codes.to(torch.uint8), "scales": scales, "zeros": zeros}

    def restore(self, tensors, shape, options):
        return ((tensors["codes"] - tensors["zeros"]) * tensors["scales"]).view(shape)


class StoresMeans(NF4Storage):
    """Some of whose bits depend on the number of threads where a weight is large."""

    def store(self, weight, options):
        means = [weight.abs().pow(power / 8).mean() for power in range(1, 17)]
        return {**super().store(weight, options), "means": torch.stack(means)}


class OtherInInference(NF4Storage):
    def restore(self, tensors, shape, options):
        return super().restore(tensors, shape, options) * (1.01 if torch.is_inference_mode_enabled() else 1)


class KeepsTheScaleInItsClass(StoragePlugin):
    """With a second layer, the first one is made dense with the scale of the second."""

    name = "scale_of_class"
    scale = torch.ones(())

    def store(self, weight, options):
        type(self).scale = weight.abs().max() / 127
        return {"codes": (weight / self.scale).round().to(torch.int8)}

    def restore(self, tensors, shape, options):
        return tensors["codes"] * self.scale


class KeepsRows(NF4Storage):
    def __init__(self):
        super().__init__()
        self.kept = {}

    def rows(self, tensors, index, shape, options):
        key = (id(tensors["codes"]), *index.shape)
        if key not in self.kept:
            self.kept[key] = super().rows(tensors, index, shape, options)
        return self.kept[key]


class WrongRows(NF4Storage):
    def rows(self, tensors, index, shape, options):
        return super().rows(tensors, index, torch.Size((shape[0], shape[-1])), options)


class ScalesOfDefaultType(StoragePlugin):
    """Codes and scales in whatever type torch makes a tensor of floats."""

    name = "scales_of_default_type"

    def store(self, weight, options):
        scale = torch.tensor(float(weight.abs().amax()) / 100, device=weight.device)
        return {"codes": (weight / scale).round().to(torch.int8), "scale": scale}

    def restore(self, tensors, shape, options):
        return (tensors["codes"] * tensors["scale"]).view(shape)


class DenseOfDefaultType(Int8Storage):
    name = "dense_of_default_type"

    def restore(self, tensors, shape, options):
        return super().restore(tensors, shape, options).to(torch.get_default_dtype())


class TableOnDefaultDevice(Int8Storage):
    def restore(self, tensors, shape, options):
        return super().restore(tensors, shape, options) * torch.ones(shape)


class TableOfTheCpu(StoragePlugin):
    """torch takes a tensor of the CPU, indexed by one that has no values, for one of the CPU."""

    name = "table_of_the_cpu"
    levels = torch.arange(-8, 8)

    def store(self, weight, options):
        scale = weight.abs().amax().clamp(min=1e-30) / 7
        return {"codes": ((weight / scale).round() + 8).to(torch.uint8), "scale": scale}

    def restore(self, tensors, shape, options):
        return self.levels[tensors["codes"].int()] * tensors["scale"]


class TakesAValue(Int8Storage):
    """By `item()`, which is right on every device, though it waits for it."""

    def restore(self, tensors, shape, options):
        dense = super().restore(tensors, shape, options)
        return dense if tensors["codes"].max().item() else torch.zeros_like(dense)


class TakesThemByNumpy(Int8Storage):
    def restore(self, tensors, shape, options):
        codes = tensors["codes"]
        again = torch.from_numpy(codes.cpu().numpy().copy()).to(codes.device)
        return super().restore({**tensors, "codes": again}, shape, options)


@pytest.mark.parametrize("plugin", [TakesAValue(), TakesThemByNumpy()], ids=["item", "numpy"])
def test_a_storage_may_take_values(plugin, device):
    check_storage_plugin(plugin, device=device, only=["device"])


class StoredOnDefaultDevice(Int8Storage):
    def store(self, weight, options):
        return super().store(weight * torch.tensor(1.0), options) | {"largest": torch.zeros(1)}


class RowsOnDefaultDevice(NF4Storage):
    def rows(self, tensors, index, shape, options):
        return super().rows(tensors, index, shape, options) + torch.zeros(shape[1:])


class Unpacked(NF4Storage):
    def packed(self, codes):
        return codes.long()

    def unpacked(self, codes):
        return self.table[codes]

    def levels_at(self, codes, positions):
        return self.table[codes[positions]]


class HoldsALambda(NF4Storage):
    def __init__(self):
        self.function = lambda codes: codes


class AsksForAValue(Int8Storage):
    def restore(self, tensors, shape, options):
        dense = super().restore(tensors, shape, options)
        return dense if float(dense.sum()) else dense.clone()


VIOLATIONS = {
    "registration": [Unnamed, OwnMinSize],
    "names": [TakenName, FloatingCodes],
    "dense": [
        Shifted,
        Half,
        TransposedSquare,
        KeepsScales,
        BlocksInAByte,
        ClampedZero,
        Flushes,
        Clamps,
        ScaleOfTheFirstRow,
    ],
    "zeros": [Shift],
    "outliers": [HalfScales, HalfMaxima],
    "bits": [Noisy, LearnsItsRange, StoresMeans, OtherInInference, ScalesOfDefaultType, DenseOfDefaultType],
    "untouched": [InPlace, View, ChangesOptions, SetsAnOption],
    "stateless": [KeepsTheDenseWeight, KeepsRows, KeepsTheScaleInItsClass],
    "rows": [WrongRows],
    "device": [TableOnDefaultDevice, TableOfTheCpu, StoredOnDefaultDevice, RowsOnDefaultDevice],
    "size": [Unpacked],
    "copies": [HoldsALambda],
    "compile": [AsksForAValue],
}


def test_every_check_has_a_violation():
    assert list(VIOLATIONS) == list(STORAGE_CHECKS)


@pytest.mark.parametrize(
    ("name", "plugin"),
    [(name, plugin) for name, plugins in VIOLATIONS.items() for plugin in plugins],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_violation_fails_its_check(name, plugin):
    assert_found(name, lambda: check_storage_plugin(plugin(), only=[name]))


class KeepsItsFirstTable(Int8Storage):
    ones = None

    def restore(self, tensors, shape, options):
        dense = super().restore(tensors, shape, options)
        if self.ones is None:
            self.ones = torch.ones(1, device=dense.device)
        return dense * self.ones


def test_a_table_of_another_device_is_seen(device):
    with pytest.raises(CheckError, match=r"fails the check 'device'(.|\n)*or the plugin object keeps a table"):
        check_storage_plugin(KeepsItsFirstTable(), device=device)


class MisspeltCodes(NF4Storage):
    def restore(self, tensors, shape, options):
        return super().restore({"codes": tensors["coeds"], **tensors}, shape, options)


def test_a_misspelt_tensor_is_told_with_a_near_one():
    with pytest.raises(CheckError, match=r"store\(\) gives no 'coeds'\. Did you mean 'codes'\?"):
        check_storage_plugin(MisspeltCodes())


class HalfOfTheBits(StoragePlugin):
    name = "upper_bits"

    def store(self, weight, options):
        return {"bits": weight.to(torch.bfloat16).view(torch.int16)}

    def restore(self, tensors, shape, options):
        return tensors["bits"].view(torch.bfloat16).float()


def test_a_storage_of_half_the_bytes_passes():
    check_storage_plugin(HalfOfTheBits())
