"""What files have beside A and B: changes of biases and of normalizations, which become values of the adapter here."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lora_plugins.config import rank_divisor
from lora_plugins.errors import AdapterFileError, listing
from lora_plugins.formats.places import placed_values, places_by_name, tensor_names
from lora_plugins.formats.portable import PortableAdapter
from lora_plugins.inplace import full_name, own_tensor
from lora_plugins.utils import common_type, single_at_least

_VALUE = "value"

ENDINGS: Mapping[str, str] = {
    ".diff": "weight",
    ".w_norm": "weight",
    ".diff_b": "bias",
    ".b_norm": "bias",
    ".scale": _VALUE,
}
"""What follows the name of a module in keys of ComfyUI and LyCORIS, and in those of norms of Flux, and what it is.

The last takes the place of the weight; the others are added to the weight or the bias, whatever alpha is.
"""


@dataclass(frozen=True)
class Beside:
    """What a file has beside the A and B of one module, by kind."""

    tensors: Mapping[str, Tensor]

    @property
    def outputs(self) -> int:
        """The number of outputs of the module; 0 where its tensors differ in it."""
        lengths = {len(tensor) for tensor in self.tensors.values()}
        return lengths.pop() if len(lengths) == 1 else 0

    def with_rows(self, rows: Callable[[Tensor], Tensor]) -> "Beside":
        """Returns what is beside A and B for those outputs that `rows` selects."""
        return Beside({kind: rows(tensor) for kind, tensor in self.tensors.items()})


def take_beside(found: dict[str, dict[str, Tensor]]) -> dict[str, Beside]:
    """Takes what is beside A and B out of the tensors of modules, and returns it by name of the module.

    Raises:
        AdapterFileError: If it has no real number for each output.
    """
    beside = {}
    for name, factors in [*found.items()]:
        own = {kind: factors.pop(kind) for kind in dict.fromkeys(ENDINGS.values()) if kind in factors}
        for kind, tensor in own.items():
            if tensor.dim() == 0 or not tensor.is_floating_point():
                raise AdapterFileError(
                    f"What the adapter has for the {kind} of {name!r} is {tuple(tensor.shape)} of {tensor.dtype}, and "
                    "no real number for each output. Copy the file again."
                )
        if own:
            beside[name] = Beside(own)
        if not factors:
            del found[name]
    return beside


def changes_and_values(beside: Mapping[str, Beside]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns what is added to tensors, and what takes their place, by full names of the tensors."""
    changes, values = {}, {}
    for name, found in beside.items():
        for kind, tensor in found.tensors.items():
            if kind == _VALUE:
                values[full_name(name, "weight")] = tensor
            else:
                changes[full_name(name, kind)] = tensor
    return changes, values


def changed_values(model: nn.Module, adapter: PortableAdapter) -> dict[str, Tensor]:
    """Returns the values of an adapter with those that it changes: the model's own, or its, and the change.

    The adapter has the names of the model, which has the base's own values in place.

    Raises:
        AdapterFileError: If a change has no place in the model, or another shape.
    """
    values = placed_values(model, adapter.values)
    biases = {
        f"{name}.bias": layer.bias.to(wide) * (layer.alpha / rank_divisor(layer.r, use_rslora=adapter.use_rslora))
        for name, layer in adapter.layers.items()
        if layer.bias is not None and (wide := single_at_least(layer.bias.dtype))
    }
    changes = _of_parameters(model, adapter.changes)
    _check_present(model, [*changes, *biases])
    wrong = []
    for name, change in (*placed_values(model, changes).items(), *placed_values(model, biases).items()):
        present = values.get(name, own_tensor(model, name).detach())
        if present.shape != change.shape or not present.is_floating_point() or present.is_meta:
            kind = f"{tuple(present.shape)} of {present.dtype}{' on the meta device' * present.is_meta}"
            wrong.append(f"{name!r} has a change {tuple(change.shape)}, and is {kind} in this model")
            continue
        wide = single_at_least(common_type(present.dtype, change.dtype))
        values[name] = (present.to("cpu", wide) + change.to(wide)).to(present.dtype)
    if wrong:
        raise AdapterFileError("The adapter does not fit this model:\n  " + "\n  ".join(wrong))
    return values


def _of_parameters(model: nn.Module, changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns changes by the names of tensors.

    Keys that name a parameter alone, as `scale_shift_table` of Wan, are read as those of a module with a weight.

    Raises:
        AdapterFileError: If the file has two changes of one tensor.
    """
    names = tensor_names(model)
    found: dict[str, Tensor] = {}
    for name, change in changes.items():
        bare = name.removesuffix(".weight")
        own = bare if name not in names and bare in names else name
        if own in found:
            raise AdapterFileError(
                f"The adapter has two changes of {own!r}, and it cannot be told which is meant. Take one of them out "
                "of the file."
            )
        found[own] = change
    return found


def _check_present(model: nn.Module, names: Iterable[str]) -> None:
    """Refuses changes of biases that layers of the model do not have."""
    places = places_by_name(model)
    changed = [path for path, _, kind in (name.rpartition(".") for name in names) if kind == "bias" and path in places]
    bare = [path for path in changed if getattr(places[path].module, "bias", path) is None]
    if bare:
        raise AdapterFileError(
            f"The adapter changes the bias of {listing(bare)}, and the model has none there. Give each such layer one "
            "of zeros before: layer.bias = nn.Parameter(torch.zeros(...)), one for each output."
        )
