"""The scores that a module logs in validation, task by task."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def task_score(metrics: Mapping[str, Tensor], name: str, task: int, alone: bool) -> float:
    """Return the value that was logged for one task.

    With several validation loaders, Lightning appends the loader's number to the name of a metric.

    Args:
        metrics: The Trainer's ``callback_metrics``.
        name: The name in ``self.log(name, …)``.
        task: The task's index, which is also the number of its validation loader.
        alone: Whether a value logged without a loader's number belongs to this task, too.

    Returns:
        The value.

    Raises:
        ValueError: If no value was logged for the task.

    Example:
        >>> import torch
        >>> task_score({"val_acc/dataloader_idx_1": torch.tensor(0.5)}, "val_acc", task=1, alone=False)
        0.5
    """
    for key in (name + _suffix(task), *([name] if alone else [])):
        if key in metrics:
            return float(metrics[key])
    raise ValueError(
        f"{name!r} was not logged for task {task}, only {sorted(metrics)}: "
        f"log it in the module's validation_step, self.log({name!r}, value)"
    )


def add_plain_names(metrics: dict[str, Tensor], task: int) -> None:
    """Add the values logged for one task under their names without the loader's number.

    Args:
        metrics: The Trainer's ``callback_metrics``, changed in place.
        task: The task's index.

    Example:
        >>> import torch
        >>> metrics = {"val_acc/dataloader_idx_1": torch.tensor(0.5)}
        >>> add_plain_names(metrics, task=1)
        >>> metrics["val_acc"]
        tensor(0.5000)
    """
    suffix = _suffix(task)
    metrics |= {name.removesuffix(suffix): value for name, value in metrics.items() if name.endswith(suffix)}


def _suffix(task: int) -> str:
    return f"/dataloader_idx_{task}"
