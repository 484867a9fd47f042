"""The checkpoints that the callbacks of a run have written."""

from collections.abc import Iterable

from lightning.pytorch import Callback


def written_by(callbacks: Iterable[Callback | None]) -> list[str]:
    """Returns their paths: of each ModelCheckpoint the best one, then the last one, as far as it has them."""
    names = ("best_model_path", "last_model_path")
    return [str(path) for callback in callbacks for name in names if (path := getattr(callback, name, ""))]
