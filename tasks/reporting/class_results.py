"""Results of each class, from confusion matrices."""

from collections.abc import Sequence

from torch import Tensor

from lora_plugins.tasks.pages import ClassResult
from lora_plugins.tasks.segmentation import class_colors

MOST_CONFUSED = 20


def class_results(
    names: Sequence[str], after: Tensor, before: Tensor | None, train: Tensor | None, *, per_pixel: bool
) -> tuple[ClassResult, ...]:
    """The results of each class: its IoU if a label is predicted for each pixel, else its recall.

    `after` and `before` are confusion matrices (true, predicted) of the val split after and before training, `train`
    (classes,) is how often each class was trained on; None if it was not measured or counted.
    """
    scores = [None if matrix is None else _scores(matrix, per_pixel) for matrix in (before, after)]
    precision = _shares(after.diagonal(), after.sum(0))
    colors = [f"#{bytes(color).hex()}" for color in class_colors(len(names))]
    return tuple(
        ClassResult(
            name=name,
            color=colors[i],
            before=scores[0][i] if scores[0] else None,
            after=scores[1][i] if scores[1] else None,
            precision=precision[i],
            train=None if train is None else int(train[i]),
            val=int(after[i].sum()),
        )
        for i, name in enumerate(names)
    )


def most_confused(confusion: Tensor) -> tuple[tuple[int, int, int], ...]:
    """The largest numbers beside the diagonal of a confusion matrix: true class, predicted class, how often."""
    mistakes = confusion.clone().fill_diagonal_(0).flatten()
    counts, places = mistakes.topk(min(MOST_CONFUSED, len(mistakes)))
    pairs = zip(counts.tolist(), places.tolist(), strict=True)
    return tuple((place // len(confusion), place % len(confusion), count) for count, place in pairs if count)


def mean_iou(confusion: Tensor) -> float | None:
    """The mean IoU over the classes that occur; None if there are none."""
    known = [score for score in _scores(confusion, True) if score is not None]
    return sum(known) / len(known) if known else None


def _scores(confusion: Tensor, per_pixel: bool) -> list[float | None]:
    true, predicted, right = confusion.sum(1), confusion.sum(0), confusion.diagonal()
    return _shares(right, true + predicted - right if per_pixel else true)


def _shares(parts: Tensor, wholes: Tensor) -> list[float | None]:
    return [part / whole if whole else None for part, whole in zip(parts.tolist(), wholes.tolist(), strict=True)]
