"""ForgettingCurves: records the score on every task while later tasks are learned, and shows it."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn import functional as F

from lightning_blip.blip import BLIP
from lightning_blip.results import figures, loggers, names
from lightning_blip.results.record import RECORD, BoundaryRecord, Predicted, RunRecord, Score, plain
from lightning_blip.tasks.scores import task_score
from lightning_blip.tasks.sequence import position, sequence
from lightning_blip.tasks.task import Task
from lightning_blip.trainer.classes import Callback, callbacks_of
from lightning_blip.trainer.internals import optimizer_steps
from lightning_blip.trainer.logging import define_axis, log_metrics, wandb_loggers

_PACKAGES = ("lightning-blip", "pytorch-lightning", "torch")


class ForgettingCurves(Callback):
    """Record the score on every task while later tasks are learned; log it, and write tables and pictures.

    At every validation the callback logs the score on each task seen so far to every logger, as
    ``forgetting/<metric>/<task>``. At each boundary, after bits were frozen, it also logs
    ``forgetting/average_score``, ``forgetting/backward_transfer`` and ``forgetting/forgetting``; their last
    values stand in the summary of the run. ``forgetting/position`` is the position in the sequence, in tasks:
    i + e/E after e of the E epochs of task i. Loggers that take charts (Weights & Biases, TensorBoard and
    MLflow) get them at each boundary, see :func:`lightning_blip.results.loggers.show`.

    The callback writes into the Trainer's log folder. At each boundary it writes ``forgetting.json``, a
    :class:`~lightning_blip.results.record.RunRecord`, from which ``lightning-blip report`` makes a page. When
    the fit ends it writes ``forgetting.csv`` and ``forgetting.png``: one curve per task, and R as a heat map.

    Args:
        metric: The name of the metric that the module logs in ``validation_step``; higher is better.
        log_frozen_state: Whether the fit, when it ends, logs what BLIP has frozen to Weights & Biases as an
            artifact.
        ceilings: For each task the score that counts as 1, such as the score of a network that learned the
            task alone. Scores are divided by their ceilings before they are logged, recorded or drawn. So
            tasks of different scales, such as games, can be compared and averaged. None leaves the scores as
            they are.

    Raises:
        ValueError: If a ceiling is not positive. In a fit, if the module does not log the metric, the Trainer
            has no sequence of tasks, or there is not one ceiling per task. In a resumed fit, if the scores of
            the checkpoint were divided by other ceilings.

    Example:
        >>> curves = ForgettingCurves("val_acc")
        >>> trainer = pl.Trainer(callbacks=[curves], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        metric: str = "val_acc",
        log_frozen_state: bool = False,
        ceilings: Sequence[float] | None = None,
    ) -> None:
        if ceilings is not None and not all(isfinite(one) and one > 0 for one in ceilings):
            raise ValueError(f"ceilings={list(ceilings)} must be positive: each is a score that counts as 1")
        self.metric = metric
        self.log_frozen_state = log_frozen_state
        self.ceilings = None if ceilings is None else list(ceilings)
        self.matrix: Tensor = torch.zeros(0, 0)
        """R (T, T): the score on task j after learning task i, NaN where not measured."""
        self._scores: list[Score] = []
        self._frozen: list[BoundaryRecord] = []
        self._predicted: list[Predicted] = []
        self._at_boundary = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Clear the record, unless the fit continues a sequence that was begun before."""
        if stage != "fit":
            return
        tasks = sequence(trainer)
        if self.ceilings is not None and len(self.ceilings) != len(tasks):
            raise ValueError(
                f"ceilings={self.ceilings} must be one score for each of the {len(tasks)} tasks: "
                f"{[task.name for task in tasks.tasks]}"
            )
        if len(self.matrix) != len(tasks) or tasks.learned == tasks.epoch == 0:
            self.matrix = torch.full((len(tasks), len(tasks)), torch.nan)
            self._scores, self._frozen, self._predicted = [], [], []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the position in the sequence the x axis of the scores in Weights & Biases."""
        self._warn_of_missing(trainer)
        tasks = [task.name for task in sequence(trainer).tasks]
        define_axis(trainer, names.GROUP, names.metric_names(self.metric, tasks))

    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Note that the next validation scores the network as the boundary leaves it."""
        self._at_boundary = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record and log the score on each task seen so far."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        learning = sequence(trainer).task
        place = learning.index + 1.0 if self._at_boundary else position(trainer)
        logged = names.score_metrics(self.metric, place, self._record_scores(trainer, learning, place))
        blip = _blip(trainer)
        if self._at_boundary:
            logged |= names.matrix_metrics(self.matrix)
            if blip is not None and blip.last_boundary is not None:
                self._frozen.append(BoundaryRecord.of(learning.name, blip.last_boundary))
                self._predicted.append(Predicted(place, self._frozen[-1].predicted_forgetting))
        elif blip is not None and blip.tasks_learned:
            self._predicted.append(Predicted(place, blip.predicted_forgetting(pl_module)))
        log_metrics(trainer, logged)
        if self._at_boundary:
            self._at_boundary = False
            self._write(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the record, the table and the picture."""
        self._write(trainer, fit_ended=True)

    def record(self, trainer: pl.Trainer) -> RunRecord:
        """Return all that was measured so far.

        Args:
            trainer: The Trainer, whose settings become part of the record.

        Returns:
            The record.
        """
        tasks, blip = sequence(trainer), _blip(trainer)
        task_names = [task.name for task in tasks.tasks]
        settings = {
            "ceilings": self.ceilings and dict(zip(task_names, self.ceilings, strict=True)),
            "blip": blip and blip.as_dict() | {"norm_stats": blip.norm_stats_in_use},
            "chosen": blip and blip.chosen,
            "stream": {"tasks": len(tasks), "epochs": tasks.epochs, "batch_size": tasks.batch_size},
            "hyperparameters": dict(trainer.lightning_module.hparams),
            "versions": {name.replace("-", "_"): version(name) for name in _PACKAGES},
        }
        return RunRecord(
            self.metric if self.ceilings is None else f"{self.metric} / ceiling",
            task_names,
            self.matrix.tolist(),
            list(self._scores),
            list(self._frozen),
            list(self._predicted),
            plain(settings),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return all that was measured so far, so that a resumed fit adds to it."""
        return {
            "matrix": self.matrix,
            "history": [asdict(score) for score in self._scores],
            "frozen": [asdict(frozen) for frozen in self._frozen],
            "predicted": [asdict(predicted) for predicted in self._predicted],
            "ceilings": self.ceilings,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what a saved fit measured; the sequence of that fit may have been shorter.

        Raises:
            ValueError: If the saved scores were divided by other ceilings.
        """
        saved: Tensor = state_dict["matrix"]
        ceilings = state_dict.get("ceilings")
        if ceilings != (self.ceilings and self.ceilings[: len(saved)]):
            raise ValueError(
                f"ceilings={self.ceilings} differ from the checkpoint's {ceilings}, by which its scores were "
                f"divided: resume with ForgettingCurves(ceilings={ceilings})"
            )
        more = max(0, len(self.matrix) - len(saved))
        self.matrix = F.pad(saved, (0, more, 0, more), value=torch.nan)
        self._scores = [Score(**{"position": torch.nan, **score}) for score in state_dict["history"]]
        self._frozen = [BoundaryRecord.from_plain(frozen) for frozen in state_dict.get("frozen", [])]
        self._predicted = [Predicted(**predicted) for predicted in state_dict.get("predicted", [])]

    def _warn_of_missing(self, trainer: pl.Trainer) -> None:
        """Warn before the training if nothing can be logged at its end."""
        if not self.log_frozen_state or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return  # Lightning removes the loggers of a trial run
        for needed, found in (("BLIP", _blip(trainer)), ("WandbLogger", wandb_loggers(trainer))):
            if not found:
                rank_zero_warn(f"log_frozen_state=True does nothing: the Trainer has no {needed}")

    def _record_scores(self, trainer: pl.Trainer, learning: Task, place: float) -> dict[str, float]:
        """Record the scores of a validation; return them by the names of the tasks."""
        seen = sequence(trainer).tasks[: learning.index + 1]
        step, epoch = optimizer_steps(trainer), trainer.current_epoch
        scores = {}
        for task in seen:
            score = task_score(trainer.callback_metrics, self.metric, task.index, alone=len(seen) == 1)
            score /= 1.0 if self.ceilings is None else self.ceilings[task.index]
            self.matrix[learning.index, task.index] = scores[task.name] = score
            self._scores.append(Score(step, epoch, place, learning.name, task.name, score, self._at_boundary))
        return scores

    def _write(self, trainer: pl.Trainer, fit_ended: bool = False) -> None:
        """Write the record; show it in the loggers or, after the fit, write the table and the picture."""
        # Lightning broadcasts the folder, so every process must ask for it.
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        if not self._scores or not trainer.is_global_zero:
            return
        record = self.record(trainer)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            record.write(folder / RECORD)
            if fit_ended:
                self._write_table(folder / "forgetting.csv")
                figures.overview(record).savefig(folder / "forgetting.png", dpi=120)
                self._save_frozen_state(trainer)
            else:
                loggers.show(trainer, record)
        except OSError as error:  # a full disk, for example, must not end the fit
            rank_zero_warn(
                f"The forgetting curves up to task {self._scores[-1].learning!r} could not be written into "
                f"{folder}, or shown by the loggers: {error}. They are still in curves.matrix"
            )
            return
        if fit_ended:
            rank_zero_info(f"Forgetting curves: {folder / 'forgetting.csv'} and {folder / 'forgetting.png'}")

    def _save_frozen_state(self, trainer: pl.Trainer) -> None:
        blip = _blip(trainer)
        if self.log_frozen_state and blip is not None:
            learned = [one.task for one in self._frozen]
            metadata = {"tasks": learned, "used_capacity": blip.used_capacity, "chosen": blip.chosen}
            loggers.save_frozen_state(trainer, blip.state_dict(), metadata)

    def _write_table(self, path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as lines:
            writer = csv.DictWriter(lines, fieldnames=list(Score.__dataclass_fields__))
            writer.writeheader()
            writer.writerows({**asdict(score), "boundary": int(score.boundary)} for score in self._scores)


def _blip(trainer: pl.Trainer) -> BLIP | None:
    return next((one for one in callbacks_of(trainer) if isinstance(one, BLIP)), None)
