"""An adapter that is about to be put on a model."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lora_plugins.adapter.content import AdapterContent
from lora_plugins.inplace import StoredWeight
from lora_plugins.plan import Plan


@dataclass(frozen=True)
class NewAdapter:
    """An adapter that fits a model, and is not on it yet.

    Args:
        plan: What it adapts.
        content: Its tensors by layer name and slot suffix.
        values: Its heads, biases and statistics by full name, where they were saved.
        changed: The base weights that its init replaces, by full name; None where they are to be computed.
        stored: The base weights that are stored in fewer bytes from now on, by full name; None where they are to be
            made.
    """

    plan: Plan
    content: AdapterContent
    values: Mapping[str, Tensor] = field(default_factory=dict)
    changed: Mapping[str, Tensor] | None = None
    stored: Mapping[str, StoredWeight] | None = None
