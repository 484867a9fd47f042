"""Provenance: which task, model and classes a file of weights is of, in plain JSON beside the weights.

An adapter folder holds it in its manifest, a merged safetensors file in its metadata, a checkpoint under its key.
`lora_plugins.tasks.inference` builds the task again from any of the three.
"""

from collections.abc import Mapping
from typing import Any

PROVENANCE_KEY = "task"
"""Its key in a checkpoint and in the manifest of an adapter folder."""

METADATA_KEY = f"lora_plugins.{PROVENANCE_KEY}"
"""Its key in the metadata of a safetensors file."""

Provenance = Mapping[str, Any]
