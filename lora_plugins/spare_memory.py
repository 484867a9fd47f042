"""Memory of weights that nothing uses any more, for new weights of the same size."""

import torch
from torch import Tensor


class SpareMemory:
    """Keeps memory that would be given back, and moves new tensors into it.

    A system hands out memory page by page, at each page's first touch, which takes several times as long as filling it.
    On other devices than a CPU torch's allocators keep memory themselves, so there is never any here.
    """

    def __init__(self) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}

    def keep(self, tensors: list[Tensor]) -> None:
        """Takes the memory of tensors that the caller is about to forget, in place of what it has.

        Args:
            tensors: Those whose memory somebody else knows are left out.
        """
        self._storages = {
            tensor.untyped_storage().nbytes(): tensor.untyped_storage()
            for tensor in tensors
            if _is_plain(tensor) and _is_known_here_only(tensor)
        }

    def move(self, tensor: Tensor) -> Tensor:
        """Returns the values of a tensor in kept memory, laid out as they were; the tensor where none fits."""
        storage = self._storages.pop(tensor.untyped_storage().nbytes(), None) if _is_plain(tensor) else None
        if storage is None:
            return tensor
        moved = tensor.new_empty(0).set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
        return moved.copy_(tensor)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.is_cpu and type(tensor) is Tensor


def _is_known_here_only(tensor: Tensor) -> bool:
    """Whether its memory is torch's own, and no other tensor of this or another process has it.

    What came from a file, an array or another library cannot be resized. Pinned memory may be on its way to a device.
    """
    storage, alone = tensor.untyped_storage(), torch.empty(0)
    return (
        storage.resizable()
        and not storage.is_shared()
        and not tensor.is_pinned()
        and _uses(storage) == _uses(alone.untyped_storage())
    )


def _uses(storage: torch.UntypedStorage) -> int:
    return torch._C._storage_Use_Count(storage._cdata)
