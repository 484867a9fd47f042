"""Checks of what an adapted layer goes through: merging, unloading, copies, files, devices, compiling."""

import copy
import pickle
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_plugins.inplace import base_class_of
from lora_plugins.model import LoraModel
from lora_plugins.plugins import Slot
from lora_plugins.testing.check import Check, as_check
from lora_plugins.testing.layer_case import (
    Holder,
    LayerCase,
    adapter_leaves,
    call,
    copies,
    lawful,
    require_lawful,
    runs,
    updated,
)
from lora_plugins.testing.required import (
    CPU,
    copied,
    real_tensors_of,
    require,
    require_all_close,
    require_same_state,
    tensors_of,
)


def _require_restored(
    what: str, got: Mapping[str, Tensor], before: Mapping[str, Tensor], untouched: nn.Module, inputs: Sequence[Any]
) -> None:
    """Requires the bits of before, but for what a call of the untouched model changes: counts, or statistics."""
    first = copied(untouched.state_dict())
    call(untouched, inputs)
    then = copied(untouched.state_dict())
    moved = {key for key, tensors in first.items() if not all(map(torch.equal, tensors, then[key]))}
    kept, expected = ({key: state[key] for key in state if key not in moved} for state in (got, before))
    require_same_state(what, kept, expected)


@as_check(
    "merge",
    "merging computes the same output, unmerging restores every bit, and merging for good leaves the plain layer",
    "from_matrix or branch does something else without gradients than with them; or the layer keeps what it "
    "computed from its weight before it was adapted, which forget has to drop.",
)
def _merge(case: LayerCase) -> None:
    model = case.model().eval()
    original = copy.deepcopy(model.state_dict())
    inputs = case.arguments(model.layer)
    call(model, inputs)  # a layer that keeps what it computes from its weight keeps that of the base
    lora = case.adapt(model)
    adapted = call(model, inputs)
    again = call(model, inputs)
    lora.merge_adapter()
    require_all_close("the merged output", call(model, inputs), adapted)
    lora.unmerge_adapter()
    base = {key: value for key, value in model.state_dict().items() if key in original}
    _require_restored("the unmerged model", base, original, case.model().eval(), inputs)
    require_all_close("the output after unmerging", call(model, inputs), again, 0)
    with lora.disable_adapter():
        call(model, inputs)
    plain = lora.merge_and_unload()
    require(type(plain.layer) is type(case.model().layer), f"merged for good, the layer is a {type(plain.layer)}")
    require(list(plain.state_dict()) == list(original), f"merged for good, its keys are {list(plain.state_dict())}")
    require_all_close("the output, merged for good,", call(plain, inputs), adapted)


@as_check(
    "unload",
    "unloading gives the layer back: its class, its attributes, its state dict, bit for bit, and its output",
    "branch or slots keeps something on the layer: a plugin may read a layer and change nothing of it; or the "
    "layer keeps what it computed from its adapted weight, which a property in class_attributes has to prevent, or "
    "forget to drop.",
)
def _unload(case: LayerCase) -> None:
    model = case.model().train()
    original, before = copy.deepcopy(model.state_dict()), set(vars(model.layer))
    base = type(model.layer)
    inputs = case.arguments(model.layer)
    lora = case.adapt(model)
    _backward(call(model, inputs))
    lora.unload()
    require(type(model.layer) is base, f"the layer is a {type(model.layer)}")
    untouched = case.model().train()
    _require_restored("the unloaded model", model.state_dict(), original, untouched, inputs)
    attributes = vars(model.layer).keys()
    different = sorted((before - attributes) | (attributes - vars(untouched.layer).keys()))
    require(not different, f"the layer's attributes differ in {different}")
    _answers_as_before(case)


def _answers_as_before(case: LayerCase) -> None:
    """Requires the output of the untouched layer from one that had an adapter between calls in eval mode."""
    model, untouched = case.model().eval(), case.model().eval()
    inputs = case.arguments(model.layer)
    expected = [call(untouched, inputs) for _ in range(4)]  # as often as the other one: a layer may count calls
    call(model, inputs)
    lora = case.adapt(model)
    call(model, inputs)
    lora.merge_adapter()
    call(model, inputs)
    lora.unmerge_adapter()
    lora.unload()
    require_all_close("the output after unloading in eval mode", call(model, inputs), expected[-1])


def _backward(output: Any) -> None:
    torch.stack([tensor.sum() for tensor in real_tensors_of(output) if tensor.requires_grad]).sum().backward()  # type: ignore[no-untyped-call]


class _Twice(Holder):
    """A model that calls one layer, which has two names, with one half of its inputs after the other."""

    def __init__(self, holder: Holder) -> None:
        super().__init__(holder.layer, holder.form)
        self.again = holder.layer

    def forward(self, *both: Any) -> Any:
        half = len(both) // 2
        return [tensors_of(super().forward(*both[:half])), tensors_of(super().forward(*both[half:]))]


@as_check(
    "aliases",
    "a layer that stands in the model under two names has one adapter, which acts under both",
    "something is remembered by layer, such as its last output.",
)
def _aliases(case: LayerCase) -> None:
    model = _Twice(case.model()).eval()
    before = copy.deepcopy(model.state_dict())
    lora = case.adapt(model, target="again")
    require(model.layer is model.again, "the two names have two layers")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    require(len(trained) == 2 * len(case.slots()), f"what is trained is {trained}")
    each = [case.arguments(model.layer), case.arguments(model.layer, seed=2)]
    both = (*each[0], *each[1])
    holder = Holder(model.layer, model.form).eval()
    expected = [tensors_of(call(lawful(case, holder), inputs)) for inputs in each]
    require_all_close("the output of a layer with two names", call(model, both), expected)
    lora.merge_adapter()
    require_all_close("its merged output", call(model, both), expected)
    lora.unload()
    _require_restored("the unloaded model", model.state_dict(), before, _Twice(case.model()).eval(), both)


@as_check(
    "keys",
    "the state dict keeps every key of the base and gains lora_A and lora_B of each slot, which alone are trained",
    "two slots have the same part, or a part is no identifier.",
)
def _keys(case: LayerCase) -> None:
    model = case.model()
    base, expected = copy.deepcopy(model.state_dict()), set(model.state_dict())
    slots = case.plugin.slots(model.layer)
    names = [f"layer.lora_{factor}{slot.suffix}.default" for slot in slots for factor in "AB"]
    require(len(names) == len(set(names)), f"the slots would have the keys {names}")
    case.adapt(model)
    require(set(model.state_dict()) == expected | set(names), f"the keys are {sorted(model.state_dict())}")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    require(trained == set(names), f"what is trained is {sorted(trained)}")
    for name in names:
        model.get_parameter(name)
    model.load_state_dict(base)
    require_same_state("the model after its base was loaded", {k: model.state_dict()[k] for k in base}, base)


@as_check(
    "device",
    "A and B follow model.to(device), and the layer runs where the untouched layer runs",
    "branch makes a tensor without device=x.device.",
)
def _device(case: LayerCase) -> None:
    model, untouched = case.adapted().train(), case.model().train()
    inputs = case.arguments(model.layer)
    expected = call(lawful(case, model), inputs)
    # A tensor that is made without saying where lands on the default device, which is none here.
    with torch.device("meta"):
        if runs(untouched, inputs):
            got = tensors_of(call(model, inputs))
            require(
                not any(tensor.is_meta for tensor in got), "the output is on the default device, not on the layer's"
            )
            require_all_close("the output with another default device", got, expected)
    moved = replace(case, device=CPU).adapted().train().to(case.device)
    require_lawful(f"the output after a move to {case.device}", case, moved, inputs)
    model.to("meta")
    left = [name for name, parameter in model.named_parameters() if not parameter.is_meta]
    require(not left, f"{left} did not move with model.to(device)")


@as_check(
    "deepcopy",
    "copy.deepcopy gives an adapted model that computes the same and shares nothing with the original",
    "the plugin object holds something that cannot be copied. A plugin is stateless: keep it free of attributes.",
)
def _deepcopy(case: LayerCase) -> None:
    model = case.adapted().eval()
    _compare_copy(case, model, copy.deepcopy(model), "copy")


@as_check(
    "pickle",
    "an adapted model can be pickled, and comes back as it was",
    "the plugin's class is defined inside a function, or the plugin object holds a lambda, a lock or a file.",
)
def _pickle(case: LayerCase) -> None:
    model = case.adapted().eval()
    _compare_copy(case, model, pickle.loads(pickle.dumps(model)), "pickled copy")


def _compare_copy(case: LayerCase, model: Holder, other: Holder, what: str) -> None:
    inputs = case.arguments(model.layer)
    expected = call(model, inputs)
    require_all_close(f"the output of the {what}", call(other, inputs), expected, 0)
    with torch.no_grad():
        for parameter in adapter_leaves(other.layer):
            parameter.mul_(2)
    require_all_close("the output of the original, after the copy was changed,", call(model, inputs), expected, 0)
    require_lawful(f"the output of the {what}, after it was changed,", case, other, inputs)
    require(base_class_of(other.layer) is type(case.model().layer), f"the {what} is a {base_class_of(other.layer)}")
    LoraModel(other).unload()


@as_check(
    "compile",
    "torch.compile(fullgraph=True) compiles the adapted layer wherever it compiles the untouched one",
    "branch decides by the value of a tensor (.item(), if x.sum() > 0), prints, or calls what torch cannot trace.",
)
def _compile(case: LayerCase) -> None:
    if case.backend is None:
        return
    model = case.adapted().train()
    inputs = case.arguments(model.layer)
    try:
        if _compiles(case.model().train(), inputs, case.backend):
            compiled = torch.compile(model, fullgraph=True, backend=case.backend)
            require_lawful("the compiled output", case, model, inputs, run=lambda _, inputs: compiled(*copies(inputs)))
    finally:
        torch.compiler.reset()


def _compiles(module: nn.Module, inputs: tuple[Any, ...], backend: str) -> bool:
    """Whether the untouched layer compiles in one graph, and to what it computes: one that draws numbers does not."""
    expected = tensors_of(call(module, inputs))
    try:
        got = tensors_of(torch.compile(module, fullgraph=True, backend=backend)(*copies(inputs)))
    except Exception:  # torch has no class for all that can go wrong here
        return False
    return all(torch.allclose(first, second) for first, second in zip(got, expected, strict=True))


@as_check(
    "files",
    "an adapter that is saved and loaded onto a fresh base gives the same bits",
    "slots depend on something other than the layer's class and options, such as its identity.",
)
def _files(case: LayerCase) -> None:
    model = case.adapted().eval()
    inputs = case.arguments(model.layer)
    fresh = case.model().eval()
    with tempfile.TemporaryDirectory() as folder:
        LoraModel(model, registry=case.registry()).save_adapter(Path(folder))
        LoraModel.load_adapter(fresh, Path(folder), registry=case.registry())
    require_same_state("the loaded model", fresh.state_dict(), model.state_dict())
    require_all_close("the output of the loaded model", call(fresh, inputs), call(model, inputs), 0)


@as_check(
    "stateless",
    "the plugin object is the same before and after, and slots() gives the same each time",
    "the plugin keeps something of a layer in an attribute; one plugin object serves all layers of all models.",
)
def _stateless(case: LayerCase) -> None:
    before = repr(vars(case.plugin))
    model = case.model().train()
    slots: list[list[Slot]] = [list(case.plugin.slots(model.layer)) for _ in range(2)]
    require(slots[0] == slots[1], f"slots() of one layer gives {slots[0]}, and then {slots[1]}")
    lora = case.adapt(model)
    _backward(call(model, case.arguments(model.layer)))
    lora.merge_adapter()
    after = repr(vars(case.plugin))
    require(before == after, f"the plugin's attributes were {before} and are {after}")
    require(bool(updated(case.plugin, model.layer, {"default": 1.0})), "the plugin has no update any more")


LIFE_CHECKS: tuple[Check[LayerCase], ...] = (
    _merge,
    _unload,
    _aliases,
    _keys,
    _device,
    _deepcopy,
    _pickle,
    _compile,
    _files,
    _stateless,
)
