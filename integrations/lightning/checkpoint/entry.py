"""The entry `lora_plugins` of a checkpoint.

The file is Lightning's own, with two differences: its state dicts leave out the frozen base, and this entry says what
was left out and how to rebuild the adapters, in plain types and tensors:

    {"format": 1, "left_out": [keys], "adapters": [{"target", "active", "weight", "manifest", "tensors"}, ...],
     "attribute_dicts": [paths], "line": {"instantiator", "hyperparameters"}}

The last two say how the hyperparameters in the file differ from those of the module, see `attribute_dicts` and
`rebuilding`.
`tensors` holds what the manifest lists and the state dict does not have, such as heads of inactive adapters. Where an
earlier adapter was merged into weights, which no pretrained base has, a further part, "base", lists their keys in the
state dict: they are put into the module first. "base_tensors" has those that the module itself has taken out of the
state dict. "pretrained" has the fingerprints of those that they are put in place of, since the rest of that base is
left out. "of_callbacks" says where states of callbacks, such as averages, had which tensors of the base: they leave
them out as well. "outside" has the fingerprint of each frozen tensor that was left out and belongs to none of the
targets. "whole" says that nothing was left out, as in the file that a tuner reads back after its trials. "compiled"
says whether the module has written names of `torch.compile`, which the file leaves out and its hook may look for.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lora_plugins import AdapterFileError
from lora_plugins.errors import LoraError

KEY = "lora_plugins"
"""Key of the entry in a checkpoint."""

FORMAT = 1
"""Version of the entry which this release writes, and the newest that it reads."""


def checked_entry(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the entry of a checkpoint.

    Raises:
        AdapterFileError: If it is not one that this release can read.
    """
    entry: Any = checkpoint[KEY]
    version = entry.get("format") if isinstance(entry, dict) else None
    if not isinstance(version, int):
        raise AdapterFileError(f"The entry {KEY!r} of the checkpoint is damaged: it has no format version.")
    if version > FORMAT:
        raise AdapterFileError(
            f"The checkpoint has format {version} of lora_plugins, and this release reads up to {FORMAT}: upgrade "
            "lora-plugins to the release that wrote it."
        )
    if not all(isinstance(entry.get(key), list) for key in ("left_out", "adapters")):
        raise AdapterFileError(f"The entry {KEY!r} of the checkpoint is damaged. Copy the file again.")
    return dict(entry)


@contextmanager
def entry_errors() -> Iterator[None]:
    """Reports an entry whose parts have the wrong type or are missing as damaged.

    Raises:
        AdapterFileError: If the block trips over something in the entry.
    """
    try:
        yield
    except LoraError:
        raise
    except Exception as error:  # a third of Python's errors, by what was damaged
        raise AdapterFileError(
            f"The entry {KEY!r} of the checkpoint is damaged: {error!r}. Copy the file again."
        ) from error
