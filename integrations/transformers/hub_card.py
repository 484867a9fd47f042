"""The model card of a run."""

from pathlib import Path
from typing import Any

from transformers import TrainerState

from lora_plugins.hub import CardContent, model_card
from lora_plugins.plugins import FORMATS, OWN_FORMAT, default_registry
from lora_plugins.utils import replace_file

_END = "train_runtime"
"""What the Trainer logs when a training ends, before it loads the best checkpoint."""


def write_card(
    folder: Path, repository: str, base_model: str | None, license: str | None, state: TrainerState, *, best: bool
) -> None:
    """Writes `README.md` into an adapter folder."""
    summary = default_registry().get(FORMATS, OWN_FORMAT).summary(folder)
    content = CardContent(repository, OWN_FORMAT, summary, base_model, license, measured(state, best=best))
    replace_file(folder / "README.md", model_card(content).encode())


def measured(state: TrainerState, *, best: bool) -> dict[str, float]:
    """Returns what was measured of the model as it is now, on all sets; numbers alone, which a card can show.

    `best` says whether the best checkpoint is loaded when a training ends.
    """
    log: list[dict[str, Any]] = state.log_history
    ended = max((number for number, entry in enumerate(log) if _END in entry), default=-1)
    found = _evaluations(log[ended + 1 :])
    if not found and (evaluated := _evaluations(log)):
        loaded = best and state.best_model_checkpoint is not None
        step = state.best_global_step if loaded else evaluated[-1]["step"]
        found = [entry for entry in evaluated if entry["step"] == step]
    return {
        key.removeprefix("eval_"): float(value)
        for entry in found
        for key, value in entry.items()
        if key.startswith("eval_") and not key.endswith(("runtime", "per_second")) and isinstance(value, int | float)
    }


def _evaluations(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for entry in log if any(key.startswith("eval_") for key in entry)]
