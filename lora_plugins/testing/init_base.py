"""What the kit for inits checks of the base: what changes in it, how it comes back, and what files hold of it."""

import copy
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from lora_plugins.adapter import factor_dtype
from lora_plugins.errors import LoraError
from lora_plugins.model import LoraModel
from lora_plugins.testing.check import Check, as_check
from lora_plugins.testing.init_case import InitCase, layer_weights, run
from lora_plugins.testing.init_start import require_near_start
from lora_plugins.testing.required import move_values, require, require_close, require_same_state
from lora_plugins.utils import own_randomness


@as_check(
    "base",
    "the base weights change if changes_base says so and not else, and unloading gives them back bit for bit",
    "context.weight is changed in place: it is the model's own, to be read only.",
)
def _base(case: InitCase) -> None:
    model = case.model()
    before, output = copy.deepcopy(model.state_dict()), run(model)
    lora = case.adapt(model)
    changed = [key for key, value in before.items() if not torch.equal(model.state_dict()[key], value)]
    if not case.init.changes_base:
        require(not changed, f"changes_base=False, and {changed} changed")
    require(bool(changed) == case.init.changes_base, "changes_base=True, and no weight changed")
    require(set(changed) <= {f"{name}.weight" for name in case.layers}, f"{changed} changed")
    with lora.disable_adapter():
        require_close("the output without the adapter", run(model), output, 0)
    lora.unload()
    require_same_state("the unloaded model", model.state_dict(), before)


@as_check(
    "recipe",
    "the recipe is a copy, and changed_base gives the same bits each time, and changes neither weight nor recipe",
    "the recipe holds context.A instead of context.A.clone(), or changed_base draws random numbers.",
)
def _recipe(case: InitCase) -> None:
    model = case.model()
    lora = case.adapt(model)
    plan = lora.plans["default"]
    if not case.init.changes_base:
        return
    for context in case.contexts(case.model()):
        original = context.weight.clone()
        with torch.no_grad():
            recipe = case.init.fill(context)
        shared = {context.A.data_ptr(), context.B.data_ptr()} & {tensor.data_ptr() for tensor in recipe.values()}
        require(not shared, "the recipe is A or B itself, which training will move, and not a copy")
        kept = {name: tensor.clone() for name, tensor in recipe.items()}
        weight, bases = original.clone(), []
        for seed in (0, 1):
            with own_randomness(seed):
                bases.append(case.init.changed_base(weight, recipe, context.scaling, plan.init_options).clone())
            require_close(f"the weight of {context.layer!r} after changed_base", weight, original, 0)
            require_same_state(f"the recipe of {context.layer!r} after changed_base", recipe, kept)
        require_close(f"the base of {context.layer!r}, computed again,", bases[1], bases[0], 0)


@as_check(
    "files",
    "an adapter that is saved and loaded onto the original base gives the same bits, without data",
    "changed_base uses something that is neither the weight nor in the recipe, such as an attribute of the plugin.",
)
def _files(case: InitCase) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        lora = case.adapt(case.model(dtype))
        _load_again(case, lora, case.model(dtype), f"the loaded model of {dtype}")


def _load_again(case: InitCase, lora: LoraModel, fresh: nn.Module, what: str) -> None:
    """Requires that an adapter, trained, gives the same bits on a fresh model in another process."""
    move_values(parameter for name, parameter in lora.model.named_parameters() if "lora_" in name)
    with tempfile.TemporaryDirectory() as folder:
        lora.save_adapter(Path(folder))
        LoraModel.load_adapter(fresh, Path(folder), registry=replace(case, init=case.elsewhere).registry())
    require_same_state(what, fresh.state_dict(), lora.model.state_dict())


@as_check(
    "stored",
    "on a base that is stored in fewer bytes, the start is nearer to the untouched weights than what is stored, "
    "and a saved adapter stores the same bits again",
    "base_to_store, which is what changed_base returns by default, leaves the recipe or the scaling out.",
)
def _stored(case: InitCase) -> None:
    model = case.model()
    untouched = layer_weights(model, case.layers)
    try:
        lora = case.adapt(model, quantize="int8", quantize_options={"min_size": 0})
    except LoraError:  # an init may not take such bases
        require_same_state("the model after it was refused", model.state_dict(), case.model().state_dict())
        return
    if case.init.identity and case.init.changes_base:
        # Rounding is another one than that of the untouched weight, and may be larger than what was taken out.
        require_near_start(lora, untouched, slack=0.1)
    _load_again(case, lora, case.model(), "the loaded model with stored weights")


@as_check(
    "dtype",
    "A and B are float32 on a base in half precision and float64 on float64, with finite values",
    "a constant of a fixed type, as torch.eye(r) where torch.eye(r, dtype=context.A.dtype) is meant.",
)
def _dtype(case: InitCase) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        model = case.model(dtype)
        case.adapt(model)
        wanted = factor_dtype(torch.empty(0, dtype=dtype))
        for name, tensor in model.state_dict().items():
            expected = wanted if "lora_" in name else dtype
            require(tensor.dtype == expected, f"{name!r} is of {tensor.dtype} on a base of {dtype}")
            require(bool(tensor.isfinite().all()), f"{name!r} has values that are not finite, on a base of {dtype}")


BASE_CHECKS: tuple[Check[InitCase], ...] = (_base, _recipe, _files, _stored, _dtype)
"""Checks of the base under a start, and of its files."""
