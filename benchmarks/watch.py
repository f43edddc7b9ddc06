"""The callback that reports where a run is, and collects what its record needs besides the scores."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, cast

import pytorch_lightning as pl

from benchmarks.games import Games
from benchmarks.networks import Classifier
from benchmarks.protocols import Protocol
from benchmarks.scoring import accuracy
from lightning_blip import BLIP, ForgettingCurves, Task, TaskHeads
from lightning_blip.metrics import average_score
from lightning_blip.tasks.sequence import has_tasks, sequence

#: Called with where a run is, in words, and the share of it that is done, 0 to 1.
Report = Callable[[str, float], None]


def print_report(where: str, _share: float) -> None:
    """Print where a run is."""
    print(where, flush=True)


def part_of(report: Report, index: int, count: int) -> Report:
    """Return a report for one of several fits, which together make up a run."""
    return lambda where, share: report(f"{index + 1} of {count}: {where}", (index + share) / count)


class Watch(pl.Callback):
    """Report where a run is after each epoch, and collect what its record needs.

    Args:
        protocol: The stream.
        label: The name of the run and its seed, for the report.
        method: The callback of the method.
        report: Called after each epoch.
        ceilings: The score of each task that counts as 100 %, if that is not 1.

    Attributes:
        curves: The scores on learned tasks.
        seconds: The duration of the fit.
        used_capacity: The share of all bits that BLIP has frozen, after each task.
        at_first: The score on each task before any training, for a shared head.
        ahead: The score on each task but the first, right before it is learned, for a shared head.
        points: The position in tasks and the score in %, by name of a game.
    """

    def __init__(
        self,
        protocol: Protocol | Games,
        label: str,
        method: pl.Callback,
        report: Report,
        ceilings: list[float] | None,
    ) -> None:
        self.method = method
        self.curves = ForgettingCurves(protocol.metric, ceilings=ceilings)
        self.seconds = 0.0
        self.used_capacity: list[float] = []
        self.at_first: list[float] = []
        self.ahead: list[float] = []
        self.points: dict[str, list[list[float]]] = {}
        self._label = label
        self._epochs = protocol.epochs
        self._follows = isinstance(protocol, Games)
        self._report = report
        self._begun = 0.0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock; score the untrained network where it has a shared head."""
        self._begun = time.perf_counter() - self.seconds
        module = cast(Classifier, pl_module)
        if has_tasks(trainer) and not self.at_first and not isinstance(module.head, TaskHeads):
            self.at_first = [accuracy(module, task) for task in sequence(trainer).tasks]

    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Stop a run that diverged; score the next task and note the used capacity."""
        tasks = sequence(trainer).tasks
        if not all(theta.isfinite().all() for theta in pl_module.parameters()):
            raise FloatingPointError(f"The weights are not finite after {task}")
        if self.at_first and task.index + 1 < len(tasks):
            self.ahead.append(accuracy(cast(Classifier, pl_module), tasks[task.index + 1]))
        if isinstance(self.method, BLIP):
            self.used_capacity.append(round(self.method.used_capacity, 6))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report where the run is."""
        self.seconds = time.perf_counter() - self._begun
        epoch, epochs = trainer.current_epoch, trainer.fit_loop.max_epochs or 1
        mean = average_score(self.curves.matrix)
        self._report(
            f"{self._label}: task {epoch // self._epochs + 1} of {epochs // self._epochs}, "
            f"epoch {epoch % self._epochs + 1} of {self._epochs}, {self.seconds:.0f} s"
            + (f", mean score {100 * float(mean):.2f} %" if mean.isfinite() else ""),
            (epoch + 1) / epochs,
        )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Collect the scores of games over the whole training."""
        if self._follows:
            for score in self.curves.record(trainer).scores:
                points = self.points.setdefault(score.task, [])
                points.append([round(score.position, 4), round(100 * score.score, 2)])

    def state_dict(self) -> dict[str, Any]:
        """Return what a run that goes on after an interruption needs."""
        names = ("seconds", "used_capacity", "at_first", "ahead")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after an interruption."""
        for name, value in state_dict.items():
            setattr(self, name, value)
