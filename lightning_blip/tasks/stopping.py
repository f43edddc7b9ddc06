"""Ending a task before its last epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pytorch_lightning as pl
from torch import Tensor

from lightning_blip.tasks.scores import task_score
from lightning_blip.tasks.sequence import NamedTask, sequence
from lightning_blip.trainer.classes import Callback


class TaskStopping(Callback):
    """End a task early when a monitored value stops improving, and restore the task's best weights.

    Unlike Lightning's ``EarlyStopping``, it ends the task, not the fit, and the patience starts again with
    every task. The epochs that a task saves are not given to later tasks.

    Args:
        monitor: The name of a value that the module logs every epoch. Of a value logged in validation, that
            of the current task is monitored. (A value logged in training is not known to a fit that is
            resumed from a checkpoint saved right after the validation: save at the end of the training
            epoch.)
        patience: The number of epochs without improvement after which a task ends: one number for all tasks,
            or one per task.
        mode: ``"min"`` if lower values are better, ``"max"`` if higher values are better.
        min_delta: The smallest change that counts as an improvement, in the units of the value.
        restore_best: Whether a task ends with the weights of its best epoch instead of its last epoch.

    Raises:
        ValueError: If ``patience`` or ``mode`` is invalid; in a fit, if ``monitor`` is never logged.

    Example:
        >>> stopping = TaskStopping("val_acc", patience=2, mode="max")
    """

    def __init__(
        self,
        monitor: str,
        patience: int | Sequence[int] = 3,
        mode: Literal["min", "max"] = "min",
        min_delta: float = 0.0,
        restore_best: bool = True,
    ) -> None:
        patiences = [patience] if isinstance(patience, int) else list(patience)
        if not patiences or min(patiences) < 0:
            raise ValueError(
                f"patience={patience} must be 0 or more epochs: one number for all tasks, or one per task"
            )
        if mode not in ("min", "max"):
            raise ValueError(f"mode={mode!r} must be 'min' or 'max'")
        self.monitor = monitor
        self.patience = patience
        self.mode = mode
        self.min_delta = min_delta
        self.restore_best = restore_best
        self._best = float("inf")
        self._waited = 0
        self._weights: dict[str, Tensor] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that a list of patiences has one entry per task."""
        if stage == "fit" and not isinstance(self.patience, int):
            tasks = len(sequence(trainer))
            if len(self.patience) != tasks:
                raise ValueError(
                    f"patience={self.patience} has {len(self.patience)} entries for {tasks} tasks: "
                    "give one number for all tasks, or one per task"
                )

    def observe(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: NamedTask) -> bool:
        """Read the monitored value of the epoch that just ended.

        Returns:
            Whether the task should end now.
        """
        score = task_score(trainer.callback_metrics, self.monitor, task.index, alone=True)
        if self.mode == "max":
            score = -score
        if score < self._best - self.min_delta:
            self._best = score
            self._waited = 0
            if self.restore_best:
                self._weights = {
                    name: value.detach().cpu().clone() for name, value in pl_module.state_dict().items()
                }
        else:
            self._waited += 1
        patience = self.patience if isinstance(self.patience, int) else self.patience[task.index]
        return self._waited > 0 and self._waited >= patience

    def restore(self, pl_module: pl.LightningModule) -> None:
        """Load the weights of the task's best epoch into the module, and start again for the next task."""
        if self._weights:
            pl_module.load_state_dict(self._weights)
        self._best, self._waited, self._weights = float("inf"), 0, {}

    def state_dict(self) -> dict[str, Any]:
        """Return the best value, the epochs without improvement and the best weights of the current task."""
        return {"best": self._best, "waited": self._waited, "weights": self._weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a saved state."""
        self._best = state_dict["best"]
        self._waited = state_dict["waited"]
        self._weights = state_dict["weights"]
