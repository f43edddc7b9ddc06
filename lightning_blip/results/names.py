"""The names under which ForgettingCurves logs scores, metrics and charts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isfinite

from torch import Tensor

from lightning_blip.metrics import average_score, backward_transfer, forgetting

#: The first part of the names of all scores and metrics.
GROUP = "forgetting"
#: The position in the sequence, in tasks, at which a row was logged.
POSITION = f"{GROUP}/position"
#: The charts of the scores: one line per task, R as a picture, and R as a table.
CURVES, MATRIX, TABLE = f"{GROUP}/curves", f"{GROUP}/matrix", f"{GROUP}/R"
#: The chart of the used capacity; ``BITS`` with the name of a layer is the histogram of its frozen bits.
CAPACITY, BITS, BLIP_POSITION = "blip/capacity", "blip/bits", "blip/position"
_METRICS = {
    "average_score": average_score,
    "backward_transfer": backward_transfer,
    "forgetting": forgetting,
}


def score_metrics(metric: str, position: float, scores: Mapping[str, float]) -> dict[str, float]:
    """Return the scores of one validation by the names that they are logged under.

    Args:
        metric: The name of the metric.
        position: The position in the sequence, in tasks.
        scores: The score on each task seen so far, by the name of the task.

    Example:
        >>> score_metrics("val_acc", 1.5, {"first": 0.9})
        {'forgetting/position': 1.5, 'forgetting/val_acc/first': 0.9}
    """
    return {POSITION: position, **{f"{GROUP}/{metric}/{task}": score for task, score in scores.items()}}


def matrix_metrics(R: Tensor) -> dict[str, float]:
    """Return the metrics of R that are defined, by the names that they are logged under.

    Args:
        R: (T, T), NaN where not measured.

    Example:
        >>> import torch
        >>> list(matrix_metrics(torch.tensor([[0.9, torch.nan], [torch.nan, torch.nan]])))
        ['forgetting/average_score']
    """
    values = {f"{GROUP}/{name}": float(metric(R)) for name, metric in _METRICS.items()}
    return {name: value for name, value in values.items() if isfinite(value)}


def metric_names(metric: str, tasks: Iterable[str]) -> list[str]:
    """Return the names of all scores and metrics, without the leading ``forgetting/``.

    Args:
        metric: The name of the metric.
        tasks: The names of all tasks.

    Example:
        >>> metric_names("val_acc", ["first"])[:2]
        ['val_acc/first', 'average_score']
    """
    return [*(f"{metric}/{task}" for task in tasks), *_METRICS]
