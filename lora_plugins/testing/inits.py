"""The conformance kit for inits: one call that checks a plugin over its options."""

import copy
import random
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from lora_plugins.adapter import factor_dtype
from lora_plugins.errors import ConfigError, LoraError, near
from lora_plugins.inplace import detached_weight
from lora_plugins.model import LoraModel
from lora_plugins.plugins import InitContext, InitPlugin, SlotCalibration
from lora_plugins.testing import check as checks
from lora_plugins.testing.check import (
    Check,
    by_name,
    chosen,
    double_by_default,
    random_states,
    refuse,
    require,
    require_close,
    require_same_state,
    require_unmoved,
)
from lora_plugins.testing.init_case import LAYERS, InitCase, Small, layer_weights, run
from lora_plugins.utils import own_randomness

_LIKE = 10
"""How many times farther off than the best of their rank factors may be: those that leave rounding alone, twice."""

_DEPENDENT = 1e-5
"""What rows that depend on each other are off by, at most, as factors in float32 are rounded."""


def _registration(case: InitCase) -> None:
    case.registry()
    merged = {**case.init.options, **case.options}
    require(merged.keys() == set(case.init.options), f"the options are {list(merged)}")
    case.init.check_options(merged)


def _filled(case: InitCase) -> None:
    for context in case.contexts(case.model()):
        with torch.no_grad():
            case.init.fill(context)
        for name, factor in (("A", context.A), ("B", context.B)):
            bad = int((~factor.isfinite()).sum())
            require(
                not bad, f"{bad} of {factor.numel()} values of {name} of {context.layer!r} are not finite, or unset"
            )


def _device(case: InitCase) -> None:
    there, elsewhere = _started(case, 0), case.contexts(case.model())
    # A tensor that is made without saying where lands on the default device, which is none here.
    with torch.no_grad(), torch.device("meta"):
        for context in elsewhere:
            case.init.fill(context)
    for one, other in zip(there, elsewhere, strict=True):
        for name, factor, expected in (("A", other.A, one.A), ("B", other.B, one.B)):
            require_close(f"{name} of {one.layer!r} with another default device", factor, expected, 0)


def _trainable(case: InitCase) -> None:
    for context in case.contexts(case.model()):
        with torch.no_grad():
            case.init.fill(context)
        possible = min(len(context.A), *context.weight.shape)
        dead = ~(context.A.bool().any(1) | context.B.bool().any(0))
        require(
            len(dead) - int(dead.sum()) >= possible,
            f"{int(dead.sum())} of {len(dead)} ranks of {context.layer!r} are zero in both A and B",
        )
        found = _independent_ranks(context)
        require(
            found >= possible,
            f"the {len(dead)} ranks of {context.layer!r} are combinations of {found} in both A and B, and so is what "
            f"training makes of them, where {possible} are possible",
        )


def _independent_ranks(context: InitContext) -> int:
    """Returns how many ranks an update can ever have: the rank of the rows of A and the columns of B side by side.

    Of a combination of ranks that is zero in both factors the gradients are zero too, before each step and after it.
    """
    # What rows depend on is neither the size of a factor nor that of a row.
    both = [normalize(each.double().flatten(), dim=0).view(each.shape) for each in (context.A, context.B.T)]
    return int(torch.linalg.matrix_rank(normalize(torch.cat(both, 1)), rtol=_DEPENDENT))


def _identity(case: InitCase, **fields: Any) -> None:
    model = case.model(torch.float64)
    before, weights = run(model), layer_weights(model, case.layers)
    lora = case.adapt(model, **fields)
    after = run(model)
    if not case.init.identity:
        require(not torch.allclose(after, before), "identity=False, and the output is that of the untouched model")
    elif not case.init.changes_base:
        require_close("the output", after, before)
    else:
        _near_start(lora, weights, layer_weights(model, case.layers))
        _makes_up(lora, weights, layer_weights(model, case.layers))


def _near_start(
    lora: LoraModel, untouched: Mapping[str, Tensor], effective: Mapping[str, Tensor], slack: float = 0.0
) -> None:
    """Requires that the factors make up for the changed base, at least in part.

    Args:
        lora: The started model.
        untouched: The weights before, by name.
        effective: The weights as they are read now.
        slack: What may come on top, as a share of what the changed base is off by.
    """
    for name, weight in untouched.items():
        lost, left = (float(each.norm()) for each in _off(lora, name, weight, effective))
        require(
            left <= lost * (1 + slack) + checks.TIGHT,
            f"W + ΔW of {name!r} is off by {left:.3g}, and the changed base alone by {lost:.3g}",
        )


def _makes_up(lora: LoraModel, untouched: Mapping[str, Tensor], effective: Mapping[str, Tensor]) -> None:
    """Requires that the factors make up for what the base has lost about as well as any factors of their rank can.

    Of a product that was taken out, that is all; of what was rounded off, what few ranks have.
    """
    for layer in lora.plans["default"].layers:
        lost, left = _off(lora, layer.name, untouched[layer.name], effective)
        least = float(torch.linalg.svdvals(lost.flatten(1))[layer.r :].norm())
        many = 2 * layer.r > min(lost.flatten(1).shape)  # which could make up for most rounding, and need not
        require(
            many or float(left.norm()) <= _LIKE * least + checks.TIGHT * max(1.0, float(lost.norm())),
            f"W + ΔW of {layer.name!r} is off by {float(left.norm()):.3g}, and could be by {least:.3g} with this rank",
        )


def _off(lora: LoraModel, name: str, weight: Tensor, effective: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns by what the changed base of a layer is off, and by what its weight with the update."""
    return weight - detached_weight(lora.model.get_submodule(name), "weight"), weight - effective[name]


def _scaling(case: InitCase) -> None:
    if case.init.identity:
        for fields in ({"alpha": 0.25}, {"alpha": 64.0}, {"alpha": 3.0, "use_rslora": True}):
            _identity(case, **fields)


def _reproducible(case: InitCase) -> None:
    first, second, third = case.model(), case.model(), case.model()
    case.adapt(first)
    torch.rand(7)
    random.random()
    before = random_states()
    case.adapt(second)
    require_unmoved(before)
    require_same_state("the same model, started again,", second.state_dict(), first.state_dict())
    with double_by_default():
        case.adapt(third)
    require_same_state("the same model, started where float64 is the default,", third.state_dict(), first.state_dict())
    there, back = _started(case, 0), _started(case, 0, backwards=True)
    for one, other in zip(there, back, strict=True):
        for name, factor, expected in (("A", other.A, one.A), ("B", other.B, one.B)):
            require_close(f"{name} of {one.layer!r}, started after other layers,", factor, expected, 0)


def _seed(case: InitCase) -> None:
    one, two = (_started(case, seed) for seed in (0, 1))
    for first, second in zip(one, two, strict=True):
        same = torch.equal(first.A, second.A) and torch.equal(first.B, second.B)
        require(not same, f"{first.layer!r} starts the same with another seed and another weight")


def _started(case: InitCase, seed: int, *, backwards: bool = False) -> Sequence[InitContext]:
    contexts = case.contexts(case.model(seed=seed), seed)
    with torch.no_grad():
        for context in reversed(contexts) if backwards else contexts:
            case.init.fill(context)
    return contexts


def _pure(case: InitCase) -> None:
    for context in case.contexts(case.model()):
        before = copy.deepcopy((dict(context.options), context.calibration))
        weight = context.weight.clone()
        with torch.no_grad():
            case.init.fill(context)
        require_close(f"the weight of {context.layer!r} after fill", context.weight, weight, 0)
        require(dict(context.options) == before[0], f"the options were {before[0]} and are {dict(context.options)}")
        for got, expected in zip(_tensors(context.calibration), _tensors(before[1]), strict=True):
            require_close(f"the calibration of {context.layer!r} after fill", got, expected, 0)


def _tensors(calibration: SlotCalibration) -> list[Tensor]:
    moments = [calibration.inputs.total, calibration.inputs.gram] if calibration.inputs else []
    return moments if calibration.gradient is None else [*moments, calibration.gradient]


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


def _files(case: InitCase) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        lora = case.adapt(case.model(dtype))
        _load_again(case, lora, case.model(dtype), f"the loaded model of {dtype}")


def _load_again(case: InitCase, lora: LoraModel, fresh: nn.Module, what: str) -> None:
    """Requires that an adapter, trained, gives the same bits on a fresh model in another process."""
    with torch.no_grad():
        for name, parameter in lora.model.named_parameters():
            if "lora_" in name:
                parameter.mul_(1.5).add_(0.01)
    with tempfile.TemporaryDirectory() as folder:
        lora.save_adapter(Path(folder))
        LoraModel.load_adapter(fresh, Path(folder), registry=replace(case, init=case.elsewhere).registry())
    require_same_state(what, fresh.state_dict(), lora.model.state_dict())


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
        _near_start(lora, untouched, layer_weights(model, case.layers), slack=0.1)
    _load_again(case, lora, case.model(), "the loaded model with stored weights")


def _dtype(case: InitCase) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        model = case.model(dtype)
        case.adapt(model)
        wanted = factor_dtype(torch.empty(0, dtype=dtype))
        for name, tensor in model.state_dict().items():
            expected = wanted if "lora_" in name else dtype
            require(tensor.dtype == expected, f"{name!r} is of {tensor.dtype} on a base of {dtype}")
            require(bool(tensor.isfinite().all()), f"{name!r} has values that are not finite, on a base of {dtype}")


def _ranks(case: InitCase) -> None:
    for r in (1, 2, 40):
        model: Small = case.model()
        before = copy.deepcopy(model.state_dict())
        try:
            case.adapt(model, r=r, alpha=float(r))
        except LoraError:
            require_same_state(f"the model after r={r} was refused", model.state_dict(), before)
            continue
        except Exception as error:  # whatever a library raises that cannot do it
            refuse(f"r={r} ended in {type(error).__name__}: {error}")
        for name, tensor in model.state_dict().items():
            require(bool(tensor.isfinite().all()), f"{name!r} has values that are not finite, at r={r}")
        _trainable(replace(case, r=r))
        _identity(replace(case, r=r))


_CHECKS: tuple[Check[InitCase], ...] = (
    Check(
        "registration",
        _registration,
        "the registrar takes the plugin, and check_options takes its options",
        "an attribute such as name is missing, or an option has no default.",
    ),
    Check(
        "filled",
        _filled,
        "fill gives every value of A and B, in place",
        "a new tensor is made instead of context.A.copy_(...), or ranks beyond those of the weight are left out.",
    ),
    Check(
        "trainable",
        _trainable,
        "of each rank, the row of A or the column of B is not zero, nor are both the same combination of others: else "
        "it never gets a gradient, or none of its own",
        "both factors start at zero, or the ranks that a decomposition does not have do; or one row is drawn for all.",
    ),
    Check(
        "identity",
        _identity,
        "the adapted model starts as the untouched one, or, where the base changes, as near to it as its ranks allow; "
        "with identity=False it does not",
        "no factor is zero and nothing makes up for it, changed_base takes out another product than that of A and B, "
        "or identity is declared wrongly.",
    ),
    Check(
        "scaling",
        _scaling,
        "the start does not depend on alpha and use_rslora",
        "the update is scaling * B @ A, and fill or changed_base leaves context.scaling out.",
    ),
    Check(
        "reproducible",
        _reproducible,
        "the same model starts with the same bits whatever was drawn before, in whatever order its layers are started "
        "and whatever torch's default type is, and the random numbers of the process, Python's and NumPy's stay",
        "a function is called without generator=context.generator, or makes a tensor without dtype=context.A.dtype; or "
        "the plugin keeps something between calls.",
    ),
    Check(
        "pure",
        _pure,
        "fill leaves the weight, the options and the calibration as they are",
        "an operation in place on context.weight or context.calibration: work on a copy.",
    ),
    Check(
        "seed",
        _seed,
        "another seed (which comes from the run's seed and the layer's name) and another weight give another start",
        "fill makes a generator of its own with a fixed seed, so that all layers start the same.",
    ),
    Check(
        "base",
        _base,
        "the base weights change if changes_base says so and not else, and unloading gives them back bit for bit",
        "context.weight is changed in place: it is the model's own, to be read only.",
    ),
    Check(
        "recipe",
        _recipe,
        "the recipe is a copy, and changed_base gives the same bits each time, and changes neither weight nor recipe",
        "the recipe holds context.A instead of context.A.clone(), or changed_base draws random numbers.",
    ),
    Check(
        "files",
        _files,
        "an adapter that is saved and loaded onto the original base gives the same bits, without data",
        "changed_base uses something that is neither the weight nor in the recipe, such as an attribute of the plugin.",
    ),
    Check(
        "stored",
        _stored,
        "on a base that is stored in fewer bytes, the start is nearer to the untouched weights than what is stored, "
        "and a saved adapter stores the same bits again",
        "base_to_store, which is what changed_base returns by default, leaves the recipe or the scaling out.",
    ),
    Check(
        "dtype",
        _dtype,
        "A and B are float32 on a base in half precision and float64 on float64, with finite values",
        "a constant of a fixed type, as torch.eye(r) where torch.eye(r, dtype=context.A.dtype) is meant.",
    ),
    Check(
        "device",
        _device,
        "what fill makes is where A and B are, whatever torch's default device is",
        "torch.randn(shape) where torch.randn(shape, device=context.A.device) is meant.",
    ),
    Check(
        "ranks",
        _ranks,
        "r=1, and an r larger than the weight has, start with finite values, as near to the untouched model as other "
        "ranks do, and with ranks that learn, or are refused by a TargetError",
        "the decomposition of an (out, in) matrix has min(out, in) ranks at most; the others need a start too.",
    ),
)

INIT_CHECKS: dict[str, Check[InitCase]] = by_name(_CHECKS)
"""All checks of an init by name, in the order they are run."""


def check_init_plugin(
    init: InitPlugin,
    options: Iterable[Mapping[str, Any]] = ({},),
    *,
    r: int = 4,
    layers: Sequence[str] | None = None,
    only: Collection[str] | None = None,
    skip: Collection[str] = (),
) -> None:
    """Checks an init over its options; it need not be registered or installed.

    It starts a small model of an embedding, a linear layer and a convolution. An init that `needs` data gets some.

    Args:
        init: The plugin.
        options: The `init_options` to check, one after another.
        r: The rank.
        layers: Which of `embedding`, `linear` and `conv2d` to start; by default all, and for an init that needs inputs
            all but the embedding, whose indices are no vectors.
        only: Names of the checks to run; all of `INIT_CHECKS` by default.
        skip: Names of checks not to run.

    Raises:
        CheckError: At the first check that fails; an AssertionError that says what was expected, what came, and what
            authors usually got wrong.
        ConfigError: If there is no check or layer of a name, or the options are one mapping.

    Example:
        >>> from lora_plugins.inits.gaussian import GaussianInit
        >>> check_init_plugin(GaussianInit())
    """
    default = [name for name in LAYERS if name != "embedding" or init.needs != "inputs"]
    started = tuple(default if layers is None else layers)
    for name in started:
        if name not in LAYERS:
            raise ConfigError(f"The kit has no layer {name!r}. {near(name, LAYERS)}")
    selected = chosen(INIT_CHECKS, only, skip)
    for each in checks.each_of(options):
        case = InitCase(init, checks.elsewhere(init), dict(each), r, started)
        subject = f"{type(init).__name__}{f' with {dict(each)}' if each else ''}"
        for check in selected:
            checks.run(check, case, subject)
