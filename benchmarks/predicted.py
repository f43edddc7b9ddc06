"""Compare the forgetting that BLIP predicts without data with that measured on past tasks' data."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional as F

from benchmarks.learning import Run
from benchmarks.machine import machine
from benchmarks.run import parse_run
from benchmarks.trainer import quiet_trainer
from lightning_blip import BLIP, Task
from lightning_blip.fisher.isolation import left_as_before
from lightning_blip.tasks.sequence import sequence
from lightning_blip.tasks.task import MappedDataset

# The mean loss of this many samples is accurate to a few hundredths of its spread over samples.
_MOST_SAMPLES = 2_000


@dataclass(frozen=True)
class Point:
    """Predicted and measured forgetting at one moment of a task.

    Attributes:
        task: The name of the task being learned.
        share: The share of its training that is done, above 0 to 1.
        predicted: The forgetting of the earlier tasks since the last boundary that BLIP predicts, in nats per
            sample.
        measured: The mean rise of their losses since then, in nats per sample; may be negative.
    """

    task: str
    share: float
    predicted: float
    measured: float


class ForgettingWatch(pl.Callback):
    """Collect predicted and measured forgetting during each task after the first.

    Place it before BLIP among the callbacks: the last point of a task then has the weights at the end of
    training, before BLIP averages and consolidates them.

    Args:
        blip: The BLIP of the same fit.
        points_per_task: The number of points per task, evenly spaced over its steps, the last one at its end.
    """

    def __init__(self, blip: BLIP, points_per_task: int) -> None:
        self.points: list[Point] = []
        self._blip = blip
        self._points_per_task = points_per_task
        self._at_boundary: list[float] = []

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Measure the losses of the past tasks at the boundary."""
        self._at_boundary = self._past_losses(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collect a point if it is due."""
        tasks, batches = sequence(trainer), int(trainer.num_training_batches)
        done, steps = tasks.epoch * batches + batch_idx + 1, tasks.epochs[tasks.task.index] * batches
        if done < steps and _completes_a_part(done, steps, self._points_per_task):
            self._take(trainer, pl_module, done / steps)

    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Collect the last point, before BLIP averages and consolidates."""
        self._take(trainer, pl_module, 1.0)

    def _take(self, trainer: pl.Trainer, pl_module: pl.LightningModule, share: float) -> None:
        if not self._at_boundary:  # the first task
            return
        losses = self._past_losses(trainer, pl_module)
        rises = [now - before for now, before in zip(losses, self._at_boundary, strict=True)]
        name = sequence(trainer).task.name
        point = Point(name, share, self._blip.predicted_forgetting(pl_module), statistics.mean(rises))
        self.points.append(point)
        print(
            f"{name}, {share:.0%} learned: forgotten {point.predicted:.3g} nats as predicted, "
            f"{point.measured:.3g} as measured",
            flush=True,
        )

    def _past_losses(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[float]:
        return losses(self._blip, pl_module, sequence(trainer).tasks[: self._blip.tasks_learned])


def _completes_a_part(done: int, steps: int, parts: int) -> bool:
    return done * parts // steps > (done - 1) * parts // steps


def losses(blip: BLIP, module: pl.LightningModule, tasks: Sequence[Task]) -> list[float]:
    """Return the cross-entropy on training data of each task, in evaluation mode.

    The module's modes, buffers, gradients and active heads, and the random numbers, stay as they were.

    Args:
        blip: The BLIP that has learned the tasks, with the running statistics of each.
        module: The network, which is learning the next task.
        tasks: The learned tasks, in order.

    Returns:
        The mean over at most 2,000 samples of each task, the same ones at each call, in nats.
    """
    means = []
    with left_as_before(module, module.device, wanted=()):
        for task in tasks:
            blip.use_task(module, task.index)
            x, y = _samples(task)
            means.append(float(F.cross_entropy(module(x), y)))
        blip.use_task(module, blip.tasks_learned)
    return means


def _samples(task: Task) -> tuple[Tensor, Tensor]:
    held = cast(MappedDataset, task.train)
    count = min(len(held), _MOST_SAMPLES)
    return held.batch(torch.arange(count) * len(held) // count)


@dataclass(frozen=True)
class Comparison:
    """Predicted and measured forgetting on one stream.

    Attributes:
        stream: The name of the stream.
        basis: The basis of BLIP.
        settings: The arguments of BLIP that were given.
        seed: The seed of network, tasks and order of samples.
        tasks: The number of tasks.
        epochs: The number of epochs per task.
        points: All points, in order.
        machine: The processor.
        torch_version: The version of torch.
    """

    stream: str
    basis: str
    settings: dict[str, Any]
    seed: int
    tasks: int
    epochs: int
    points: list[Point]
    machine: str
    torch_version: str

    @property
    def correlation(self) -> float:
        """Spearman's rank correlation of predicted and measured forgetting."""
        correlation, _ = spearmanr(
            [point.predicted for point in self.points], [point.measured for point in self.points]
        )
        return float(correlation)

    @property
    def share_within_two(self) -> float:
        """The share of points whose measured forgetting is between half and twice the predicted one."""
        return statistics.fmean(
            point.predicted / 2 <= point.measured <= 2 * point.predicted for point in self.points
        )

    def __str__(self) -> str:
        return (
            f"{self.stream}, basis={self.basis}, {len(self.points)} points: "
            f"Spearman's rank correlation {self.correlation:.2f}"
        )

    def write(self, path: Path) -> None:
        """Write the points, the correlation and the share within a factor of two."""
        figures = {"correlation": self.correlation, "share_within_two": self.share_within_two}
        path.write_text(json.dumps({**asdict(self), **figures}, default=str) + "\n")

    def draw(self) -> Figure:
        """Return a picture of measured over predicted forgetting, one colour per task, with the diagonal."""
        figure = Figure(figsize=(8, 5), layout="constrained")
        figure.suptitle(str(self), fontsize="medium")
        axes = figure.subplots()
        tasks = list(dict.fromkeys(point.task for point in self.points))
        for index, name in enumerate(tasks):
            points = [point for point in self.points if point.task == name]
            axes.scatter(
                [point.predicted for point in points],
                [point.measured for point in points],
                color=colormaps["viridis"](0.9 * index / max(1, len(tasks) - 1)),  # its yellow is too pale
                label=f"learning {name}",
            )
        predicted = [point.predicted for point in self.points]
        low, high = min(predicted), max(predicted)
        # A loss may also fall: below the smallest prediction the axis is linear, through zero.
        axes.set_xscale("log")
        axes.set_yscale("symlog", linthresh=low)
        axes.plot([low, high], [low, high], color="0.6", zorder=0, label="measured = predicted")
        axes.set(
            xlabel="predicted forgetting (nats per sample)", ylabel="measured rise of the past tasks' loss"
        )
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize="small", frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        return figure


def compare(run: Run, data: Path, seed: int, points_per_task: int) -> Comparison:
    """Learn a stream with BLIP, and collect points during training.

    Args:
        run: The stream, and the arguments of BLIP.
        data: The folder of the data.
        seed: The seed of everything that is random.
        points_per_task: See :class:`ForgettingWatch`.

    Returns:
        The comparison.
    """
    pl.seed_everything(seed, verbose=False)
    stream = run.protocol.stream(data, seed)
    module = run.protocol.module()
    blip = BLIP(**run.settings)
    watch = ForgettingWatch(blip, points_per_task)
    quiet_trainer([watch, blip], limit_val_batches=0).fit(module, datamodule=stream)
    return Comparison(
        stream=run.protocol.name,
        basis=blip.basis,
        settings=run.settings,
        seed=seed,
        tasks=run.protocol.tasks,
        epochs=run.protocol.epochs,
        points=watch.points,
        machine=machine(),
        torch_version=torch.__version__,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predicted", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--points-per-task", type=int, default=5, help="evenly spaced, the last one at the end of the task"
    )
    parser.set_defaults(method="blip")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Collect the points of one seed, save and draw them, and print the summary."""
    parser = _parser()
    run, options = parse_run(parser, arguments)
    if run.protocol.tasks < 2:
        parser.error(f"--tasks {run.protocol.tasks}: nothing is forgotten before a second task")
    comparison = compare(run, options.data, options.seed, options.points_per_task)
    record = run.path(options.out, options.seed)
    path = record.with_name(f"predicted-{record.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    comparison.write(path)
    comparison.draw().savefig(path.with_suffix(".png"), dpi=120)
    print(f"{comparison}, {comparison.share_within_two:.0%} of the rises within a factor of two: {path}")


if __name__ == "__main__":
    main()
