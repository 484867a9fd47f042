"""The model card of a run."""

from pathlib import Path

from transformers import TrainerState

from lora_plugins.hub import CardContent, model_card
from lora_plugins.plugins import FORMATS, OWN_FORMAT, default_registry


def write_card(folder: Path, repository: str, base_model: str | None, license: str | None, state: TrainerState) -> None:
    """Writes `README.md` into an adapter folder.

    Args:
        folder: The adapter folder.
        repository: `owner/name`, or the name alone.
        base_model: Name of the base model.
        license: The license, as the Hub names it.
        state: The state of the run, whose last evaluation is what was measured.
    """
    evaluated = [entry for entry in state.log_history if any(key.startswith("eval_") for key in entry)]
    measured = {
        key.removeprefix("eval_"): float(value)
        for key, value in (evaluated[-1] if evaluated else {}).items()
        if key.startswith("eval_") and not key.endswith(("runtime", "per_second"))
    }
    summary = default_registry().get(FORMATS, OWN_FORMAT).summary(folder)
    content = CardContent(repository, OWN_FORMAT, summary, base_model, license, measured)
    (folder / "README.md").write_text(model_card(content), encoding="utf-8")
