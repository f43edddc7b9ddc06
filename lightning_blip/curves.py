"""Forgetting curves: every task's score while the later ones are learned, logged, tabulated and drawn."""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn import functional as F

from lightning_blip.bases import Callback
from lightning_blip.boundaries import log_metrics, sequence, task_score
from lightning_blip.metrics import average_score, backward_transfer, forgetting
from lightning_blip.streams import Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

# More tasks than this, and numbers in the cells of the heat map are too small to read.
_MOST_NUMBERS = 12
# As many lines of the legend fit beside the curves.
_MOST_LINES = 20


@dataclass(frozen=True)
class _Score:
    """The score on one task at one validation."""

    step: int
    epoch: int
    learning: str
    task: str
    score: float
    boundary: bool


class ForgettingCurves(Callback):
    """Keeps the score of each task while the later ones are learned, and shows it.

    At every validation it logs the score of each task seen so far to every logger, as
    ``curves/<metric>/<task>``; at each boundary, after the network was frozen, also
    ``continual/average_score``, ``continual/backward_transfer`` and ``continual/forgetting``. When the fit
    ends it writes ``forgetting.csv`` and ``forgetting.png`` into the Trainer's log folder: a curve for each
    task, and R as a heat map.

    Args:
        metric: What the module logs in ``validation_step``; higher is better.

    Raises:
        ValueError: In a fit, if the module does not log the metric, or there is no sequence of tasks.

    Example:
        >>> curves = ForgettingCurves("val_acc")
        >>> trainer = pl.Trainer(callbacks=[curves], logger=False, enable_checkpointing=False)
    """

    def __init__(self, metric: str = "val_acc") -> None:
        self.metric = metric
        self.matrix: Tensor = torch.zeros(0, 0)
        """R (T, T): the score on task j after learning task i, NaN where not measured."""
        self._history: list[_Score] = []
        self._at_boundary = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Makes room for the scores of the sequence, unless it is the rest of one that was begun."""
        if stage != "fit":
            return
        tasks = sequence(trainer)
        if len(self.matrix) != len(tasks) or tasks.learned == tasks.epoch == 0:
            self.matrix = torch.full((len(tasks), len(tasks)), torch.nan)
            self._history = []

    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """The next validation is that of the network as the boundary leaves it."""
        self._at_boundary = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes down and logs the score of each task seen so far."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        tasks = sequence(trainer)
        learning = tasks.task
        seen = tasks.tasks[: learning.index + 1]
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        logged = {}
        for task in seen:
            score = task_score(trainer.callback_metrics, self.metric, task.index, alone=len(seen) == 1)
            self.matrix[learning.index, task.index] = score
            logged[f"curves/{self.metric}/{task.name}"] = score
            self._history.append(
                _Score(step, trainer.current_epoch, learning.name, task.name, score, self._at_boundary)
            )
        if self._at_boundary:
            metrics = {
                "average_score": average_score(self.matrix),
                "backward_transfer": backward_transfer(self.matrix),
                "forgetting": forgetting(self.matrix),
            }
            logged |= {f"continual/{name}": float(x) for name, x in metrics.items() if x.isfinite()}
            self._at_boundary = False
        log_metrics(trainer, logged)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the table and the picture."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # a broadcast: every process takes part
        if not self._history or not trainer.is_global_zero:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._write_table(folder / "forgetting.csv")
            self._draw(folder / "forgetting.png")
        except OSError as error:  # such as a full disk: no reason to lose what was learned
            rank_zero_warn(
                f"The forgetting curves up to task {self._history[-1].learning!r} could not be written into "
                f"{folder}: {error}. They are still in curves.matrix"
            )
            return
        rank_zero_info(f"Forgetting curves: {folder / 'forgetting.csv'} and {folder / 'forgetting.png'}")

    def state_dict(self) -> dict[str, Any]:
        """The scores so far: a resumed fit adds to them."""
        return {"matrix": self.matrix, "history": [asdict(score) for score in self._history]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from the scores of a saved fit, whose sequence may have been shorter."""
        saved: Tensor = state_dict["matrix"]
        more = max(0, len(self.matrix) - len(saved))
        self.matrix = F.pad(saved, (0, more, 0, more), value=torch.nan)
        self._history = [_Score(**score) for score in state_dict["history"]]

    def _write_table(self, path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as lines:
            writer = csv.DictWriter(lines, fieldnames=list(_Score.__dataclass_fields__))
            writer.writeheader()
            writer.writerows({**asdict(score), "boundary": int(score.boundary)} for score in self._history)

    def _draw(self, path: Path) -> None:
        # Drawing is rare and matplotlib slow to import; a Figure of one's own leaves pyplot's state alone.
        from matplotlib.figure import Figure

        tasks = list(dict.fromkeys(score.task for score in self._history))
        figure = Figure(figsize=(13, 4.8), layout="constrained")
        curves, matrix = figure.subplots(1, 2, width_ratios=[3, 2])
        self._draw_curves(curves, tasks)
        image = self._draw_matrix(matrix, tasks)
        figure.colorbar(image, ax=matrix, label=self.metric)
        figure.savefig(path, dpi=120)

    def _draw_curves(self, axes: Axes, tasks: list[str]) -> None:
        from matplotlib import colormaps

        for index, name in enumerate(tasks):
            scores = [score for score in self._history if score.task == name]
            axes.plot(
                [score.epoch + 1 for score in scores],
                [score.score for score in scores],
                color=colormaps["viridis"](0.9 * index / max(1, len(tasks) - 1)),  # its yellow is too pale
                marker="." if len(scores) == 1 else None,
                label=name,
            )
        for epoch in sorted({score.epoch for score in self._history if score.boundary}):
            axes.axvline(epoch + 1, color="0.8", linestyle="--", linewidth=1, zorder=0)
        axes.set(xlabel="epoch (dashed: the end of a task)", ylabel=self.metric)
        axes.set_title("Score on each task while the sequence is learned")
        axes.locator_params(axis="x", integer=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(
            title="task", fontsize="small", frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5),
            ncols=1 + (len(tasks) - 1) // _MOST_LINES,
        )  # fmt: skip

    def _draw_matrix(self, axes: Axes, tasks: list[str]) -> AxesImage:
        R = self.matrix.numpy()
        image = axes.imshow(R, cmap="viridis", interpolation="nearest")
        if len(R) <= _MOST_NUMBERS:
            low, high = image.get_clim()
            for i, j in self.matrix.isfinite().nonzero().tolist():
                axes.text(
                    j, i, f"{R[i, j]:.2f}", ha="center", va="center", fontsize="small",
                    color="white" if 2 * R[i, j] < low + high else "black",
                )  # fmt: skip
            axes.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right", rotation_mode="anchor")
            axes.set_yticks(range(len(tasks)), tasks)
        else:
            axes.locator_params(integer=True)
        axes.set(xlabel="score on task", ylabel="after learning task", title="R: scores after each task")
        return image
