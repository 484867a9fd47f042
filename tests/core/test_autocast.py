"""What is made under autocast is, to the last bit, what is made without, whatever a plugin computes it from.

An adapter is loaded by one who does not know what was active where it was made.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_plugins import InitPlugin, LoraConfig, LoraModel, RowMajorPlugin, StoragePlugin
from tests.core.registries import registry_of


class Projecting(InitPlugin):
    """Takes a part out of the base by products, which autocast would round."""

    name = "projecting"
    changes_base = True

    def fill(self, context):
        nn.init.normal_(context.A, generator=context.generator)
        context.B.copy_(context.weight @ context.A.T)
        return {"B": context.B.clone(), "A": context.A.clone()}

    def changed_base(self, weight, recipe, scaling, options):
        return weight - scaling * (recipe["B"] @ recipe["A"])


class Rotating(StoragePlugin):
    """Stores a rotated weight."""

    name = "rotating"

    def store(self, weight, options):
        return {"codes": (weight @ self._rotation(weight.shape) * 100).round().to(torch.int16)}

    def restore(self, tensors, shape, options):
        return tensors["codes"].float() / 100 @ self._rotation(shape).T

    def _rotation(self, shape):
        random = torch.randn(shape[-1], shape[-1], generator=torch.Generator().manual_seed(1))
        return torch.linalg.qr(random).Q


class ScaledPlugin(RowMajorPlugin["Scaled"]):
    """Has a branch that multiplies by A as it is."""

    name, module_type = "scaled", "tests.core.test_autocast.Scaled"
    branch_types, branch_use = (module_type,), "always"

    def branch(self, layer, base, terms, x):
        y = F.linear(2 * x, base["weight"])
        return y + sum(term.scaling * F.linear(F.linear(2 * x, term.A), term.B) for term in terms)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(9, 9))

    def forward(self, x):
        return F.linear(2 * x, self.weight)


REGISTRY = registry_of(Projecting(), Rotating(), ScaledPlugin())


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4)).eval()


@pytest.mark.parametrize(
    "fields",
    [
        {"variant": "dora"},
        {"init": "pissa"},
        {"init": "olora"},
        {"init": "loftq"},
        {"init": "orthogonal"},
        {"init": "projecting"},
        {"quantize": "rotating", "quantize_options": {"min_size": 0}},
    ],
    ids=lambda fields: next(iter(fields.values())),
)
def test_adding_loading_and_merging(fields, tmp_path):
    config = LoraConfig(r=4, **fields)
    x = torch.randn(5, 12)

    def run(active, folder):
        torch.manual_seed(2)
        outputs = []
        with torch.autocast("cpu", torch.bfloat16, enabled=active):
            lora = LoraModel(build(), config, registry=REGISTRY)
        outputs.append(lora.model(x))
        nn.init.normal_(lora.model[0].lora_B["default"])
        lora.save_adapter(folder)
        with torch.autocast("cpu", torch.bfloat16, enabled=active):
            again = LoraModel.load_adapter(build(), folder, registry=REGISTRY)
        outputs.append(again.model(x))
        with torch.autocast("cpu", torch.bfloat16, enabled=active):
            again.merge_and_unload(dequantize=True)
        return [*outputs, again.model(x)]

    for found, expected in zip(run(True, tmp_path / "1"), run(False, tmp_path / "2"), strict=True):
        assert torch.equal(found, expected)


def test_stored_weights_are_restored_in_full():
    """In the forward as in a merge."""
    model = build()
    config = LoraConfig(r=3, target_modules=["0"], quantize="rotating", quantize_options={"min_size": 0})
    lora = LoraModel(model, config, registry=REGISTRY)
    expected = model[0].weight
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model[0].weight, expected)
        assert torch.equal(lora.merge_and_unload(dequantize=True)[0].weight, expected)


CHANGES = {
    "set": lambda lora, folder: lora.set_adapter("b"),
    "swap": lambda lora, folder: lora.swap_adapter("a", folder),
    "delete": lambda lora, folder: lora.delete_adapter("a"),
    "merge": lambda lora, folder: lora.merge_adapter(),
    "merge-and-unload": lambda lora, folder: lora.merge_and_unload(),
    "unload": lambda lora, folder: lora.unload(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_within_a_block_is_seen_by_the_next_call(change, tmp_path):
    """Autocast keeps the casts of parameters that require a gradient until its block ends."""
    model = nn.Sequential(build()[0], Scaled(), nn.Linear(9, 4)).eval()
    x = torch.randn(5, 12)
    for name in "ab":
        config = LoraConfig(r=2, target_modules=["0", "1"], modules_to_save=["2"], init="none")
        lora = LoraModel(model, config, name, registry=REGISTRY)
        nn.init.normal_(model[2].weight)
        lora.save_adapter(tmp_path / name)
        lora.unload()
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
        for name in "ab":
            lora = LoraModel.load_adapter(model, tmp_path / name, name, registry=REGISTRY)
        model(x)
        change(lora, tmp_path / "b")
        found = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(found, model(x))
