"""The model's own tensors whose value depends on the active adapter.

Heads and biases are trained in place, so that optimizers, hooks and state dicts see the parameters they know; moving
norm statistics and a base changed by an init are likewise the adapter's. Each adapter has its value of such a tensor,
the base keeps its own, and switching puts one of them in place by exchanging the storage behind the parameter.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from lora_plugins.adapter.group_offloading import check_no_copies
from lora_plugins.errors import StateError, listing
from lora_plugins.inplace import found_tensor, holder_of, is_shard, model_modules, own_tensor
from lora_plugins.utils import put_value

IF_OFFLOADED = (
    "If accelerate offloads the model, take that back first: accelerate.hooks.remove_hook_from_submodules(model)."
)
"""What to do where tensors are on the meta device."""


def check_whole(model: nn.Module, names: Iterable[str]) -> None:
    """Checks that tensors of a model can take other values, and be used with them.

    Raises:
        StateError: If some are split over processes.
    """
    if split := [name for name in names if is_shard(*holder_of(model, name))]:
        raise StateError(
            f"{listing(split, 3)} takes another value, and is split over processes, where it cannot be exchanged. "
            "Do it before the model is sharded, or in a whole model; adapters without modules_to_save and bias "
            "have no such values."
        )


@dataclass
class OwnedTensors:
    """Who owns which value of which tensor.

    Args:
        base: The value of the untouched model, by full name of the tensor; stale where it is in place, see
            `base_value`.
        values: The values of each adapter; that of the tensor's present owner is stale, see `value`.
        owner: The adapter whose value is in place; absent where it is the base's.
    """

    base: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    owner: dict[str, str] = field(default_factory=dict)

    def claim(self, model: nn.Module, adapter: str, values: Mapping[str, Tensor]) -> None:
        """Records an adapter's first values; none is put in place yet."""
        for name in values:
            if name not in self.base:
                self.base[name] = own_tensor(model, name).data
        self.values[adapter] = dict(values)

    def of(self, adapter: str) -> Mapping[str, Tensor]:
        """Returns the values of an adapter by full name; one that is in place is stale, see `value`."""
        return self.values.get(adapter, {})

    def check(self, adapters: Iterable[str]) -> None:
        """Refuses adapters that cannot be active together.

        Raises:
            StateError: If two of them have a value of the same tensor.
        """
        owners: dict[str, str] = {}
        for adapter in adapters:
            for name in self.of(adapter):
                other = owners.setdefault(name, adapter)
                if other != adapter:
                    raise StateError(
                        f"The adapters {other!r} and {adapter!r} cannot be active together: each has its own value "
                        f"of {name!r}. Activate one of them, combine them with add_weighted_adapter, or have only one "
                        "that trains it (modules_to_save, bias, norm) or whose init changes it."
                    )

    def check_there(self, model: nn.Module, adapters: Iterable[str]) -> None:
        """Checks that the tensors are there of which adapters have values.

        Raises:
            StateError: If one of them was removed, or replaced by one of another shape.
        """
        owned = {name for adapter in adapters for name in self.of(adapter)}
        _check_there(name for name in self.replaced(model) if name in owned)

    def activate(self, model: nn.Module, adapters: Iterable[str], *, lasting: bool = False, back: bool = False) -> None:
        """Puts the values of these adapters in place, and the base's value of every other tensor.

        Args:
            model: The model.
            adapters: Names of adapters.
            lasting: Whether they stay there, so that a backward through an earlier forward has to end in an error.
                Inside a block the values of before come back, and with them what that backward needs.
            back: Whether they come back at the end of a block, which has to end: tensors that were replaced in it stay
                as they are.

        Raises:
            StateError: If one of the tensors is gone, has another shape than its values, is offloaded, or is to stay so
                and is split over processes.
        """
        wanted = {name: adapter for adapter in adapters for name in self.of(adapter)}
        differ = [name for name in self.base if self.owner.get(name) != wanted.get(name)]
        gone = set(self.replaced(model))
        if not back:
            _check_there(name for name in differ if name in gone)
        changing = [name for name in differ if name not in gone]
        new = {name: self._values(wanted.get(name))[name] for name in changing}
        away = [name for name, value in new.items() if own_tensor(model, name).is_meta and not value.is_meta]
        if away:
            raise StateError(
                f"{listing(away, 3)} takes another value, and has none to exchange it for while on the meta device. "
                f"{IF_OFFLOADED}"
            )
        if lasting:
            check_whole(model, changing)
        if changing:
            doing = f"Giving {listing(changing, 3)} the value of another adapter, or of the base,"
            check_no_copies(model_modules(model), doing)
        self.follow_casts(model)
        for name in changing:
            present, owner = self.owner.get(name), wanted.get(name)
            tensor = own_tensor(model, name)
            value = self._values(owner)[name]
            self._values(present)[name] = tensor.data
            if lasting:
                put_value(tensor, value.to(tensor.device))
            else:
                tensor.data = value.to(tensor.device)
            self.owner.pop(name, None)
            if owner is not None:
                self.owner[name] = owner

    def follow_casts(self, model: nn.Module) -> None:
        """Casts the values that were not in place when the model was cast.

        The model was cast if a tensor has another type than the value that was put in its place. Types of values may
        differ otherwise: a head that is trained on a base in half precision is of single precision.
        """
        for name in self.base:
            if (tensor := found_tensor(model, name)) is not None:
                self._follow(tensor, name)

    def _followed(self, model: nn.Module, name: str) -> Tensor:
        """Returns the tensor that is in place, after its values have followed a cast of it."""
        tensor = own_tensor(model, name)
        self._follow(tensor, name)
        return tensor

    def _follow(self, tensor: Tensor, name: str) -> None:
        if name in self.base and tensor.dtype != self._values(self.owner.get(name))[name].dtype:
            for values in (self.base, *self.values.values()):
                if name in values:
                    values[name] = values[name].to(tensor.dtype)

    def forget_replaced(self, model: nn.Module) -> None:
        """Forgets the values of tensors that were removed, or replaced by ones of another shape."""
        for name in self.replaced(model):
            self.owner.pop(name, None)
            for values in (self.base, *self.values.values()):
                values.pop(name, None)

    def replaced(self, model: nn.Module) -> list[str]:
        """Returns the names of tensors that were removed, or replaced by ones of another shape."""
        found = {name: found_tensor(model, name) for name in self.base}
        return [
            name
            for name, tensor in found.items()
            if tensor is None or (tensor.shape != self.base[name].shape and not is_shard(*holder_of(model, name)))
        ]

    def value(self, model: nn.Module, adapter: str, name: str) -> Tensor:
        """Returns an adapter's value of a tensor, in place or not."""
        tensor = self._followed(model, name)
        return tensor.data if self.owner.get(name) == adapter else self.values[adapter][name]

    def base_value(self, model: nn.Module, name: str) -> Tensor:
        """Returns the base's value of a tensor, in place or not."""
        tensor = self._followed(model, name)
        return self.base[name] if name in self.owner else tensor.data

    def release(self, adapter: str) -> None:
        """Forgets an adapter that is not active, and the base's copies that nobody else needs."""
        del self.values[adapter]
        needed = {name for values in self.values.values() for name in values}
        self.base = {name: value for name, value in self.base.items() if name in needed}

    def _values(self, owner: str | None) -> dict[str, Tensor]:
        return self.base if owner is None else self.values[owner]


def _check_there(replaced: Iterable[str]) -> None:
    if names := list(replaced):
        raise StateError(
            f"{listing(names)} is gone or has another shape than when it was adapted: the layer was replaced, pruned "
            "or parametrized. unload() the adapters, which leaves the new layer as it is, or keep their updates by "
            "merge_and_unload(), and adapt the model again."
        )
