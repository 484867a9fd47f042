"""What the kit for variants checks around the law: what is left alone, merging, copies and files."""

import copy
import pickle
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from lora_plugins.inplace import layer_state
from lora_plugins.model import LoraModel
from lora_plugins.testing.check import Check, as_check, elsewhere
from lora_plugins.testing.required import (
    MODES,
    move_values,
    random_states,
    require,
    require_close,
    require_nothing_kept,
    require_same_state,
    require_unmoved,
)
from lora_plugins.testing.variant_case import VariantCase, deltas, move


@as_check(
    "pure",
    "delta_weight and first_values change nothing that they are handed, draw no random numbers and keep nothing",
    "an operation in place on A, B or an own tensor, or a tensor kept from an earlier call.",
)
def _pure(case: VariantCase) -> None:
    before = random_states()
    lora = case.trained()
    require_unmoved(before)
    state = {key: value.clone() for key, value in lora.model.state_dict().items()}
    first = case.run(lora.model)
    before = random_states()
    case.run(lora.model.train())
    case.run(lora.model.eval())
    require_unmoved(before)
    require_same_state("the model after two calls", lora.model.state_dict(), state)
    require_close("the output, computed again,", case.run(lora.model), first, 0)
    require_nothing_kept(lambda _: case.run(lora.model))
    _follows_the_factors(case, lora)
    _follows_the_base(case, lora)


def _follows_the_factors(case: VariantCase, lora: LoraModel) -> None:
    """Requires that the update and the output change with A, B and the variant's own tensors."""
    earlier = deltas(lora)
    for suffix, term in deltas(move(lora)).items():
        same = torch.equal(torch.as_tensor(term.delta), torch.as_tensor(earlier[suffix].delta))
        require(not same, "the update is the same after A, B and the variant's own tensors moved")
    for name, context in MODES.items():
        with context():
            case.run(lora.model)
        expected = case.expected(move(lora))
        with context():
            require_close(
                f"the output{name} after A, B and the variant's own tensors moved", case.run(lora.model), expected
            )


def _follows_the_base(case: VariantCase, lora: LoraModel) -> None:
    """Requires that another weight of the shape, as a second layer has it, gives what it gives elsewhere."""
    other = case.model()
    move_values(model[0]._parameters["weight"] for model in (other, lora.model))  # type: ignore[index]
    output = case.run(lora.model)  # before the class of the plugin sees the other one
    replace(case, variant=elsewhere(case.elsewhere)).adapt(other, init="none")
    other.load_state_dict(lora.model.state_dict())
    require_close("the output after the weight moved", output, case.run(other), 0)


@as_check("device", "what is made is where the weight is", "torch.ones(n) where A.new_ones(n) is meant.")
def _device(case: VariantCase) -> None:
    lora = case.trained()
    expected = case.expected(lora)
    x = case.batch()
    # A tensor that is made without saying where lands on the default device, which is none here.
    with torch.device("meta"):
        got = lora.model(x)
    require(not got.is_meta, "the output is on the default device, not on the layer's")
    require_close("the output with another default device", got, expected)


@as_check(
    "base",
    "delta_weight leaves the weight that it is handed alone",
    "an operation in place, such as weight.add_(...): the weight is the model's own.",
)
def _base_untouched(case: VariantCase) -> None:
    model = case.model()
    weight = model[0]._parameters["weight"]
    assert weight is not None
    before = weight.detach().clone()
    case.adapt(model, init="none")
    case.run(model).sum().backward()  # type: ignore[no-untyped-call]
    require_close("the base weight after a step", weight, before, 0)


@as_check(
    "merging",
    "merged, the plain layer computes the same; unmerged and unloaded, all bits are what they were",
    "delta_weight returns the new weight instead of by what it changes.",
)
def _merging(case: VariantCase) -> None:
    lora = case.trained()
    plain = {key: value.clone() for key, value in lora.model.state_dict().items() if "lora_" not in key}
    output = case.run(lora.model)
    lora.merge_adapter()
    require_close("the merged output", case.run(lora.model), output)
    lora.unmerge_adapter()
    require_close("the unmerged output", case.run(lora.model), output, 0)
    lora.unload()
    require_same_state("the unloaded model", lora.model.state_dict(), plain)


@as_check(
    "copies",
    "a deep copy and a pickled copy of the model compute the same",
    "state is kept on the plugin and not in tensors; its class is defined inside a function, or the plugin object "
    "holds a lambda, a lock or a file.",
)
def _copies(case: VariantCase) -> None:
    lora = case.trained()
    for what, twin in (("deep", copy.deepcopy(lora.model)), ("pickled", pickle.loads(pickle.dumps(lora.model)))):
        require_close(f"the output of a {what} copy", case.run(twin), case.run(lora.model), 0)
        state = layer_state(twin[0])  # type: ignore[index]
        require(state.adapters["default"].variant is not None, f"the {what} copy has lost its variant")


@as_check(
    "compile",
    "torch.compile(fullgraph=True) compiles the adapted layer",
    "delta_weight or row_factors decides by the value of a tensor (.item(), if own['gate'] > 0).",
)
def _compile(case: VariantCase) -> None:
    lora = case.trained()
    try:
        compiled = torch.compile(lora.model, fullgraph=True, backend="eager")
        require_close("the output of a compiled model", compiled(case.batch()), case.run(lora.model))
    finally:
        torch.compiler.reset()


@as_check(
    "files",
    "an adapter that is saved and loaded computes the same bits",
    "delta_weight uses something that is neither a tensor of the adapter nor the weight.",
)
def _files(case: VariantCase) -> None:
    other = replace(case, variant=case.elsewhere)
    lora, fresh = case.trained(), case.model()
    with tempfile.TemporaryDirectory() as folder:
        lora.save_adapter(Path(folder))
        LoraModel.load_adapter(fresh, Path(folder), registry=other.registry())
    require_same_state("the loaded model", fresh.state_dict(), lora.model.state_dict())
    require_close("the output of the loaded model", case.run(fresh), case.run(lora.model), 0)


LIFE_CHECKS: tuple[Check[VariantCase], ...] = (_pure, _device, _base_untouched, _merging, _copies, _compile, _files)
"""Checks of a variant's adapters in use."""
