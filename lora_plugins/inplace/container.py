"""Where the tensors of adapters live in a layer."""

from collections.abc import Callable, Iterator
from typing import NoReturn, cast

from torch import Tensor, nn

from lora_plugins.errors import StateError, listing
from lora_plugins.utils import single_at_least

RESERVED = frozenset({"training"})
"""Names that no adapter can have: what everyone sets on every module by its name."""


class AdapterTensors(nn.Module):
    """The tensors of one factor of a layer, by adapter name; any name but those in `RESERVED` is allowed."""

    def __getitem__(self, adapter: str) -> nn.Parameter:
        # accelerate, which keeps tensors elsewhere, puts a forward here that has them for the duration of a call.
        return self.forward(adapter)

    def forward(self, adapter: str) -> nn.Parameter:
        """Returns the tensor of an adapter.

        Raises:
            AttributeError: If there is none, as in a replica of `nn.DataParallel` that is not yet complete.
        """
        parameter = self._parameters.get(adapter)
        if parameter is not None:
            return parameter
        # FSDP puts whole tensors in the place of parameters for the duration of a forward; replicas have no parameters.
        if adapter not in self.__dict__:
            raise AttributeError(f"There is no tensor of the adapter {adapter!r}.")
        return cast(nn.Parameter, self.__dict__[adapter])

    def __setitem__(self, adapter: str, value: nn.Parameter) -> None:
        # Not register_parameter, which refuses names of methods such as "half".
        self._parameters[adapter] = value

    def __delitem__(self, adapter: str) -> None:
        del self._parameters[adapter]

    def __contains__(self, adapter: str) -> bool:
        return adapter in self._parameters

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AdapterTensors":
        """Moves and casts them; a cast leaves them float32 at least, as half precision rounds small steps away."""

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            if new.dtype == tensor.dtype:
                return new
            return tensor.to(new.device, single_at_least(new.dtype))

        return cast(AdapterTensors, super()._apply(moved, recurse))  # type: ignore[no-untyped-call]

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuses to be compiled by `torch.jit.script`, which asks before it compiles anything of a model."""
        raise StateError(
            f"torch.jit.script cannot compile layers with adapters, and these have {listing(self._parameters)}. Merge "
            "them before, by merge_and_unload(), or take them off, by unload(); torch.jit.trace needs neither."
        )

    def extra_repr(self) -> str:
        """Shows the adapters and the shape of their factors."""
        return ", ".join(f"{name}: {tuple(p.shape)}" for name, p in self._parameters.items() if p is not None)
