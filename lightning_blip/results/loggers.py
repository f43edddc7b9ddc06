"""Shows the record of a run in whatever loggers a Trainer has, each in its own way."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, Any

import numpy as np
import pytorch_lightning as pl
import torch

from lightning_blip.results import figures
from lightning_blip.results.record import RunRecord, Score
from lightning_blip.trainer.classes import is_a
from lightning_blip.trainer.logging import wandb_loggers

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def show(trainer: pl.Trainer, record: RunRecord) -> None:
    """Sends the charts of a record to every logger that takes charts.

    Weights & Biases gets ``forgetting/curves`` (a line for each task), ``forgetting/matrix`` (R as a picture)
    and ``forgetting/R`` (as a table), and of BLIP ``blip/capacity`` (a picture, stacked by layer) and
    ``blip/bits/<layer>`` (histograms); TensorBoard and MLflow get the pictures.

    Args:
        trainer: The Trainer.
        record: With one boundary at least.
    """
    if not trainer.is_global_zero:
        return
    step = record.scores[-1].step
    logger: Any  # each kind has another experiment
    for logger in trainer.loggers:
        if is_a(logger, "WandbLogger"):
            logger.log_metrics(_wandb_charts(record), step=step)
        elif is_a(logger, "TensorBoardLogger"):
            for name, picture in _pictures(record).items():
                logger.experiment.add_figure(name, picture, global_step=step)
        elif is_a(logger, "MLFlowLogger"):
            for name, picture in _pictures(record).items():
                logger.experiment.log_figure(logger.run_id, picture, f"{name}.png")


def save_frozen_state(trainer: pl.Trainer, state: dict[str, Any], metadata: dict[str, Any]) -> None:
    """Logs what BLIP has frozen as an artifact of Weights & Biases.

    Args:
        trainer: The Trainer.
        state: ``BLIP.state_dict()``; it is saved by ``torch.save`` as ``frozen.pt``.
        metadata: What is shown of it.
    """
    for logger in wandb_loggers(trainer):
        import wandb

        run = logger.experiment
        artifact = wandb.Artifact(f"frozen-state-{run.id}", type="frozen-state", metadata=metadata)
        with artifact.new_file("frozen.pt", mode="wb") as file:
            torch.save(state, file)
        run.log_artifact(artifact)


def _pictures(record: RunRecord) -> dict[str, Figure]:
    named = {
        "forgetting/curves": figures.curves_picture(record),
        "forgetting/matrix": figures.matrix_picture(record),
    }
    if record.frozen:
        named["blip/capacity"] = figures.capacity_picture(record)
    return named


def _wandb_charts(record: RunRecord) -> dict[str, Any]:
    import wandb

    lines: dict[str, list[Score]] = {name: [] for name in record.seen}
    for one in record.scores:
        if isfinite(one.score) and isfinite(one.position):  # nothing else can be written to a table
            lines[one.task].append(one)
    position = record.scores[-1].position
    charts: dict[str, Any] = {
        "forgetting/position": position,
        "forgetting/curves": wandb.plot.line_series(
            xs=[[one.position for one in scores] for scores in lines.values()],
            ys=[[one.score for one in scores] for scores in lines.values()],
            keys=list(lines),
            title=f"{record.metric} of each task",
            xname="tasks learned",
        ),
        "forgetting/matrix": wandb.Image(figures.matrix_picture(record)),
        "forgetting/R": wandb.Table(
            ["after learning", *record.tasks],
            [
                [name, *(score if isfinite(score) else None for score in row)]
                for name, row in zip(record.tasks, record.matrix, strict=True)
            ],
        ),
    }
    if record.frozen:
        charts |= {
            "blip/position": position,
            "blip/capacity": wandb.Image(figures.capacity_picture(record)),
        }
        for name, layer in record.frozen[-1].layers.items():
            edges = np.arange(len(layer.bits) + 1) - 0.5
            charts[f"blip/bits/{name}"] = wandb.Histogram(np_histogram=(np.array(layer.bits), edges))
    return charts
