"""Checks of the tensors that a file has for one layer: A, B, and what its format has beside them."""

import math
from collections.abc import Mapping

from torch import Tensor

from lora_plugins.errors import AdapterFileError


def check_factors(name: str, factors: Mapping[str, Tensor]) -> None:
    """Checks that a layer has an A and a B, and that its tensors fit each other; a model is not looked at.

    Args:
        name: Name of the layer.
        factors: Its tensors: `A`, of `(r, in, ...)`, `B`, of `(out, r, ...)`, and what else the format knows: `mid`, of
            `(r, r, ...)`, `magnitude`, `scale`, `bias_B`, of `(out,)`, `alpha`, of one element, and `shape`, that of
            the weight, to which ComfyUI enlarges a smaller one.

    Raises:
        AdapterFileError: If it lacks one, they cannot belong together, or alpha is no scaling.
    """
    if not {"A", "B"} <= {*factors}:
        has = ", ".join(sorted(factors))
        raise AdapterFileError(
            f"The layer {name!r} of the adapter has only {has}: A or B is missing. Copy the file again."
        )
    # Scripts write an alpha as they were given it, a whole number too.
    wrong = [key for key, tensor in factors.items() if key not in ("alpha", "shape") and not tensor.is_floating_point()]
    if wrong:
        raise AdapterFileError(
            f"{wrong[0]} of {name!r} holds {factors[wrong[0]].dtype}, and not real numbers. Copy the file again."
        )
    if not _fit(**factors):
        given = {key: tensor.flatten().tolist() if key == "shape" else tensor.shape for key, tensor in factors.items()}
        shapes = ", ".join(f"{key} {tuple(shape)}" for key, shape in given.items())
        raise AdapterFileError(
            f"{name!r} has {shapes}: these are no A of (r, in, ...) and B of (out, r, ...) with what belongs to them. "
            "Copy the file again."
        )
    alpha = float(factors.get("alpha", 1))
    if not (math.isfinite(alpha) and alpha > 0):
        raise AdapterFileError(
            f"The alpha of {name!r} is {alpha:g}; it has to be a positive, finite number. Other programs read 0 "
            "differently: kohya's scripts as the rank, the WebUI as no update. Write what is meant into the file, or "
            "leave the layer out."
        )


def magnitude_of(name: str, scale: Tensor, rows: int) -> Tensor:
    """Returns DoRA's norms of the outputs, from LyCORIS' `dora_scale`, which has as many dimensions as the weight.

    Raises:
        AdapterFileError: If the norms are those of the inputs, as in LyCORIS before 3.1 and with `wd_on_output=False`,
            and by default in OneTrainer.
    """
    if scale.numel() != rows or scale.shape[0] != rows:
        raise AdapterFileError(
            f"{name!r} has a dora_scale {tuple(scale.shape)}, which is not one of its {rows} outputs: LyCORIS (always "
            "before 3.1, later with wd_on_output=False) and OneTrainer (by default) train norms of the inputs, which "
            "have no form here. Merge it into the model with the program that made it."
        )
    return scale.flatten()


def _fit(
    A: Tensor,
    B: Tensor,
    mid: Tensor | None = None,
    magnitude: Tensor | None = None,
    scale: Tensor | None = None,
    bias_B: Tensor | None = None,
    alpha: Tensor | None = None,
    shape: Tensor | None = None,
) -> bool:
    r = len(A) if A.dim() > 1 else 0
    return (
        r > 0
        and B.dim() > 1
        and (bias_B is None or bias_B.shape == B.shape[:1])
        and (mid is None or (mid.dim() > 2 and mid.shape[:2] == (r, r)))
        and all(each is None or each.dim() > 0 for each in (magnitude, scale))
        and (alpha is None or alpha.numel() == 1)
        and (shape is None or shape.tolist() == [len(B), *A.shape[1:]])
    )
