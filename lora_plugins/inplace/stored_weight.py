"""A weight that is stored in fewer bytes: a module of its tensors, in place of a parameter.

The layer's own class is extended by one that answers with the dense value, made anew at each read; see `stored_class`.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_plugins.errors import PluginError, StateError
from lora_plugins.inplace.made_again import note
from lora_plugins.inplace.stored_integers import are_changed, rounded, take_note, with_own_types
from lora_plugins.plugins import Storage

SUFFIX = "_stored"
"""What the name of a stored weight's module ends with; the name of the weight stands before it."""

LIKE = "dense_like"
"""The name of a tensor of the dense type, which casts of the model change; nothing reads its one value.

It is ahead of the scales: `model.dtype` of transformers and diffusers is the type of the first floating tensor. It is
not empty: accelerate takes all empty tensors for one that is shared, and saves one of them.
"""


class StoredWeight(nn.Module):
    """The stored tensors of one weight, as parameters that are not trained.

    Args:
        storage: How it is stored.
        weight: The dense weight.
        dtype: The type of the dense value; by default that of the weight.
        source_dtype: The type of the float weight that it is made from; by default that of the weight.
        device: Where the stored tensors go; by default where the weight is.
        requires_grad: Whether the dense weight was trained, and will be once it is dense again.
    """

    def __init__(
        self,
        storage: Storage,
        weight: Tensor,
        dtype: torch.dtype | None = None,
        *,
        source_dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        requires_grad: bool,
    ) -> None:
        super().__init__()
        self.storage = storage
        self.shape = weight.shape
        self.source_dtype = source_dtype or weight.dtype
        self.was_trained = requires_grad
        self.succeeded_by(None)
        like = torch.zeros(1, dtype=dtype or weight.dtype, device=device or weight.device)
        self.register_parameter(LIKE, nn.Parameter(like, requires_grad=False))
        for name, tensor in storage.store(weight).items():
            if hasattr(self, name):
                raise PluginError(
                    f"store() of the storage {storage.plugin.name!r} gives the name {name!r}, which the module "
                    f"that holds what is stored uses itself. Call it otherwise, as in {name}_values."
                )
            # A copy: in a view, or one value that stands for many, what a state dict holds could not be loaded.
            own = tensor.detach().to(device, copy=True)
            self.register_parameter(name, nn.Parameter(own, requires_grad=False))

    @property
    def successor(self) -> "nn.Parameter | StoredWeight | None":
        """What replaces it in layers that share it, while they are updated one after the other."""
        found: nn.Parameter | StoredWeight | None = self.__dict__["_successor"]
        return found

    def succeeded_by(self, new: "nn.Parameter | StoredWeight | None") -> None:
        """Records what replaces it."""
        self.__dict__["_successor"] = new  # as no parameter or child of its own

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        # accelerate, which keeps tensors elsewhere, puts a forward here that has them for the duration of a call.
        return self.forward()

    def forward(self) -> dict[str, Tensor]:
        """Returns the stored tensors by name."""
        return {name: parameter.detach() for name, parameter in self._own().items() if name != LIKE}

    @property
    def dtype(self) -> torch.dtype:
        """The type of the dense weight."""
        return self._own()[LIKE].dtype

    @property
    def device(self) -> torch.device:
        """Where the stored tensors are."""
        return self._own()[LIKE].device

    def dense(self) -> Tensor:
        """Returns the dense weight."""
        versions = [(parameter, parameter._version) for parameter in self._own().values()]
        return note(self._dense(), lambda: self._dense_at(versions))

    def rows(self, index: Tensor) -> Tensor:
        """Returns rows of the dense weight, for any shape of indices.

        Raises:
            IndexError: If there is no such row, on a CPU; elsewhere as a lookup of torch does.
        """
        with torch.no_grad():
            numbers = torch.arange(self.shape[0], device=index.device)[:, None]
            own = F.embedding(index, numbers).squeeze(-1)  # a storage may answer for -1, and for what fills a block
            return self.storage.rows(self.tensors, own, self.shape).to(self.dtype)

    def extra_repr(self) -> str:
        """Shows what is stored."""
        return f"{self.storage.plugin.name}, {tuple(self.shape)} of {self.dtype}"

    def train(self, mode: bool = True) -> "StoredWeight":
        """Sets the mode, and checks at that point a copy that was averaged."""
        self._check_integers()
        return super().train(mode)

    def __deepcopy__(self, memo: dict[int, Any]) -> "StoredWeight":
        """Returns a copy with its own record of its integers."""
        self._check_integers()
        memo[id(self)] = new = type(self).__new__(type(self))
        new.__setstate__(copy.deepcopy(self.__dict__, memo))  # type: ignore[no-untyped-call]
        take_note(new._parameters.values())
        return new

    def _check_integers(self) -> None:
        if are_changed(self._parameters.values()):
            raise StateError(
                f"The integers of a weight of shape {list(self.shape)}, stored as {self.storage.plugin.name}, were "
                "changed in a copy of a model: an average of all parameters truncates them. Average only floating "
                "tensors (docs/howto/quantize.md has a function for AveragedModel), and load the others again: "
                "copied.load_state_dict({key: value for key, value in model.state_dict().items() if '_stored.' in "
                "key}, strict=False)."
            )

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        errors: list[str] = args[-1]
        is_copy = with_own_types(self._parameters.values())
        names = {prefix + name: parameter for name, parameter in self._parameters.items()}
        try:
            state_dict = {**state_dict, **rounded(state_dict, names)}
        except ValueError as error:
            errors.append(
                f"{str(error)!r} holds integers of a weight stored as {self.storage.plugin.name}, and the state dict "
                "has others between them, as an average of different bases has. Load those of one base."
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
        if is_copy:
            take_note(self._parameters.values())

    def _own(self) -> dict[str, Tensor]:
        """Its parameters; a replica of `nn.DataParallel` has tensors in their place."""
        return cast(dict[str, Tensor], self._parameters or self.__dict__.get("_former_parameters", {}))

    def _dense(self) -> Tensor:
        with torch.no_grad():
            return self.storage.restore(self.tensors, self.shape).to(self.dtype)

    def _dense_at(self, versions: Sequence[tuple[Tensor, int]]) -> Tensor:
        if any(tensor._version != version for tensor, version in versions):
            raise RuntimeError(
                f"The stored weight of shape {list(self.shape)} was changed between a forward and its backward."
            )
        return self._dense()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StoredWeight":
        """Moves the tensors and keeps their types: a cast is one of the dense value."""
        like = self._parameters[LIKE]

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if tensor is like or new.dtype == tensor.dtype else tensor.to(new.device)

        return cast(StoredWeight, super()._apply(moved, recurse))  # type: ignore[no-untyped-call]


def stored_weights(layer: nn.Module) -> dict[str, StoredWeight]:
    """Returns the stored weights of a layer by attribute name; empty for most layers."""
    return {
        name.removesuffix(SUFFIX): module
        for name, module in layer._modules.items()
        if isinstance(module, StoredWeight) and name.endswith(SUFFIX)
    }


def stored_weight(layer: nn.Module, name: str) -> StoredWeight | None:
    """Returns the stored weight of that attribute name; None if it is not stored."""
    module = layer._modules.get(name + SUFFIX)
    return module if isinstance(module, StoredWeight) else None


def all_stored(model: nn.Module) -> Iterator[tuple[nn.Module, str, StoredWeight]]:
    """Yields layer, attribute name and stored weight of all that are stored in a model, shared ones for each layer."""
    for module in model.modules():
        for name, stored in stored_weights(module).items():
            yield module, name, stored
