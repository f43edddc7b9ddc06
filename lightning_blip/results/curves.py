"""Forgetting curves: every task's score while the later ones are learned, logged, tabulated and drawn."""

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
from lightning_blip.metrics import average_score, backward_transfer, forgetting
from lightning_blip.results import figures, loggers
from lightning_blip.results.record import RECORD, Frozen, Predicted, RunRecord, Score, plain
from lightning_blip.tasks.scores import task_score
from lightning_blip.tasks.sequence import position, sequence
from lightning_blip.tasks.task import Task
from lightning_blip.trainer.classes import Callback, callbacks_of
from lightning_blip.trainer.internals import optimizer_steps
from lightning_blip.trainer.logging import define_axis, log_metrics, wandb_loggers

_PACKAGES = ("lightning-blip", "pytorch-lightning", "torch")
_METRICS = {
    "average_score": average_score,
    "backward_transfer": backward_transfer,
    "forgetting": forgetting,
}


class ForgettingCurves(Callback):
    """Keeps the score of each task while the later ones are learned, and shows it.

    At every validation it logs the score of each task seen so far to every logger, as
    ``forgetting/<metric>/<task>``; at each boundary, after the network was frozen, also
    ``forgetting/average_score``, ``forgetting/backward_transfer`` and ``forgetting/forgetting``, which so
    stand in the summary of a run. ``forgetting/position`` says where in the sequence that was, in tasks: i +
    e/E after e of the E epochs of task i. Loggers that take charts (Weights & Biases, TensorBoard, MLflow)
    get them at each boundary, see :func:`lightning_blip.results.loggers.show`.

    It writes into the Trainer's log folder, at each boundary, ``forgetting.json``, a
    :class:`~lightning_blip.results.record.RunRecord`, which ``lightning-blip report`` makes a page of;
    and when the fit ends, ``forgetting.csv`` and ``forgetting.png``: a curve for each task, and R as a heat
    map.

    Args:
        metric: What the module logs in ``validation_step``; higher is better.
        log_frozen_state: Whether Weights & Biases gets what BLIP has frozen, when the fit ends, as an
            artifact.
        ceilings: For each task the score that counts as 1, such as what a network reaches that learned it
            alone: scores are divided by them before they are logged, kept or drawn, so that tasks of
            different scales, as games are, can be compared and averaged. None leaves them as they are.

    Raises:
        ValueError: If a ceiling is not positive. In a fit, if the module does not log the metric, there is no
            sequence of tasks, or not one ceiling for each of them; in a resumed one, if scores were divided
            by others before.

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
        self._frozen: list[Frozen] = []
        self._predicted: list[Predicted] = []
        self._at_boundary = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Makes room for the scores of the sequence, unless it is the rest of one that was begun."""
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
        """Gives the curves their own axis."""
        self._warn_of_missing(trainer)
        scores = [f"{self.metric}/{task.name}" for task in sequence(trainer).tasks]
        define_axis(trainer, "forgetting", [*scores, *_METRICS])

    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """The next validation is that of the network as the boundary leaves it."""
        self._at_boundary = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes down and logs the score of each task seen so far."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        learning = sequence(trainer).task
        place = learning.index + 1.0 if self._at_boundary else position(trainer)
        logged = self._take_down(trainer, learning, place)
        blip = _blip(trainer)
        if self._at_boundary:
            metrics = {name: float(metric(self.matrix)) for name, metric in _METRICS.items()}
            logged |= {f"forgetting/{name}": value for name, value in metrics.items() if isfinite(value)}
            if blip is not None and blip.last_boundary is not None:
                self._frozen.append(Frozen.of(learning.name, blip.last_boundary))
                self._predicted.append(Predicted(place, self._frozen[-1].predicted_forgetting))
        elif blip is not None and blip.tasks_learned:
            self._predicted.append(Predicted(place, blip.predicted_forgetting(pl_module)))
        log_metrics(trainer, logged)
        if self._at_boundary:
            self._at_boundary = False
            self._report(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the record, the table and the picture."""
        self._report(trainer, whole=True)

    def record(self, trainer: pl.Trainer) -> RunRecord:
        """All that was measured so far.

        Args:
            trainer: The Trainer, whose settings are part of it.

        Returns:
            The record.
        """
        tasks, blip = sequence(trainer), _blip(trainer)
        names = [task.name for task in tasks.tasks]
        settings = {
            "ceilings": self.ceilings and dict(zip(names, self.ceilings, strict=True)),
            "blip": blip and blip.as_dict(),
            "chosen": blip and blip.chosen,
            "stream": {"tasks": len(tasks), "epochs": tasks.epochs, "batch_size": tasks.batch_size},
            "hyperparameters": dict(trainer.lightning_module.hparams),
            "versions": {name.replace("-", "_"): version(name) for name in _PACKAGES},
        }
        return RunRecord(
            self.metric if self.ceilings is None else f"{self.metric} / ceiling",
            names,
            self.matrix.tolist(),
            list(self._scores),
            list(self._frozen),
            list(self._predicted),
            plain(settings),
        )

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far: a resumed fit adds to it."""
        return {
            "matrix": self.matrix,
            "history": [asdict(score) for score in self._scores],
            "frozen": [asdict(frozen) for frozen in self._frozen],
            "predicted": [asdict(predicted) for predicted in self._predicted],
            "ceilings": self.ceilings,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from the scores of a saved fit, whose sequence may have been shorter.

        Raises:
            ValueError: If they were divided by other ceilings.
        """
        saved: Tensor = state_dict["matrix"]
        ceilings = state_dict.get("ceilings")
        if ceilings != (self.ceilings and self.ceilings[: len(saved)]):
            raise ValueError(
                f"ceilings={self.ceilings} differ from the checkpoint's {ceilings}, which its scores were "
                f"divided by: resume with ForgettingCurves(ceilings={ceilings})"
            )
        more = max(0, len(self.matrix) - len(saved))
        self.matrix = F.pad(saved, (0, more, 0, more), value=torch.nan)
        self._scores = [Score(**{"position": torch.nan, **score}) for score in state_dict["history"]]
        self._frozen = [Frozen.from_plain(frozen) for frozen in state_dict.get("frozen", [])]
        self._predicted = [Predicted(**predicted) for predicted in state_dict.get("predicted", [])]

    def _warn_of_missing(self, trainer: pl.Trainer) -> None:
        """Tells at once, not after the fit, that there will be no frozen state to log, or nowhere to."""
        if not self.log_frozen_state or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return  # a trial run has its loggers taken away
        for needed, found in (("BLIP", _blip(trainer)), ("WandbLogger", wandb_loggers(trainer))):
            if not found:
                rank_zero_warn(f"log_frozen_state=True does nothing: the Trainer has no {needed}")

    def _take_down(self, trainer: pl.Trainer, learning: Task, place: float) -> dict[str, float]:
        """Notes the scores of a validation, and gives them by the names that they are logged by."""
        seen = sequence(trainer).tasks[: learning.index + 1]
        step = optimizer_steps(trainer)
        logged = {"forgetting/position": place}
        for task in seen:
            score = task_score(trainer.callback_metrics, self.metric, task.index, alone=len(seen) == 1)
            score /= 1.0 if self.ceilings is None else self.ceilings[task.index]
            self.matrix[learning.index, task.index] = score
            logged[f"forgetting/{self.metric}/{task.name}"] = score
            self._scores.append(
                Score(step, trainer.current_epoch, place, learning.name, task.name, score, self._at_boundary)
            )
        return logged

    def _report(self, trainer: pl.Trainer, whole: bool = False) -> None:
        """Writes and shows what there is so far; with the whole fit done, also the table and the picture."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # a broadcast: every process takes part
        if not self._scores or not trainer.is_global_zero:
            return
        record = self.record(trainer)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            record.write(folder / RECORD)
            if whole:
                self._write_table(folder / "forgetting.csv")
                figures.overview(record).savefig(folder / "forgetting.png", dpi=120)
                self._save_frozen_state(trainer)
            else:
                loggers.show(trainer, record)
        except OSError as error:  # such as a full disk: no reason to lose what was learned
            rank_zero_warn(
                f"The forgetting curves up to task {self._scores[-1].learning!r} could not be written into "
                f"{folder}, or shown by the loggers: {error}. They are still in curves.matrix"
            )
            return
        if whole:
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
