"""Values of an adapter file that are not finite, as those of a training that diverged."""

import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from lora_plugins.errors import listing
from lora_plugins.files.manifest import value_key
from lora_plugins.inplace import found_tensor
from lora_plugins.utils import are_finite


def warn_of_not_finite(path: Path, tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    """Warns of tensors of an adapter that hold NaN or infinity: what the model answers with them is not finite either.

    It is no error, since a merge refuses updates with such values. Buffers may have them, as masks of attention do.
    """
    wrong = [key for key, tensor in tensors.items() if not are_finite(tensor) and not _is_buffer(key, model)]
    if wrong:
        warnings.warn(
            f"{path}: {listing(wrong)} of the adapter {'has' if len(wrong) == 1 else 'have'} values that are not "
            "finite, as after a training that diverged, and neither will the outputs of the model be. Load the adapter "
            "of an earlier checkpoint, or train again with a smaller learning rate.",
            stacklevel=2,
        )


def _is_buffer(key: str, model: nn.Module) -> bool:
    prefix = value_key("")
    return key.startswith(prefix) and not isinstance(found_tensor(model, key.removeprefix(prefix)), nn.Parameter)
