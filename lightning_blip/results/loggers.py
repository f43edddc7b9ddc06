"""Sends the charts of a run to the loggers of a Trainer, each logger by its own function."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, Any

import numpy as np
import pytorch_lightning as pl
import torch

from lightning_blip.results import figures, names
from lightning_blip.results.record import RunRecord
from lightning_blip.trainer.classes import is_a
from lightning_blip.trainer.logging import wandb_loggers

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def show(trainer: pl.Trainer, record: RunRecord) -> None:
    """Send the charts of a record to every logger that takes charts; only rank 0 calls this.

    Weights & Biases gets ``forgetting/curves`` (one line per task), ``forgetting/matrix`` (R as a picture)
    and ``forgetting/R`` (R as a table). With BLIP it also gets ``blip/capacity`` (a picture, stacked by
    layer) and ``blip/bits/<layer>`` (histograms). TensorBoard and MLflow get the pictures.

    Args:
        trainer: The Trainer.
        record: A record with at least one boundary.
    """
    for logger in trainer.loggers:
        for kind, send in _SENDERS.items():
            if is_a(logger, kind):
                send(logger, record)


def save_frozen_state(trainer: pl.Trainer, state: dict[str, Any], metadata: dict[str, Any]) -> None:
    """Log what BLIP has frozen as an artifact of Weights & Biases.

    Args:
        trainer: The Trainer.
        state: ``BLIP.state_dict()``, which ``torch.save`` writes into the artifact as ``frozen.pt``.
        metadata: The metadata of the artifact.
    """
    for logger in wandb_loggers(trainer):
        import wandb

        run = logger.experiment
        artifact = wandb.Artifact(f"frozen-state-{run.id}", type="frozen-state", metadata=metadata)
        with artifact.new_file("frozen.pt", mode="wb") as file:
            torch.save(state, file)
        run.log_artifact(artifact)


def _send_to_wandb(logger: Any, record: RunRecord) -> None:
    import wandb

    position = record.scores[-1].position
    sent: dict[str, Any] = {
        names.POSITION: position,
        names.CURVES: _wandb_lines(record),
        names.MATRIX: wandb.Image(figures.matrix_picture(record)),
        names.TABLE: wandb.Table(
            ["after learning", *record.tasks],
            [
                [task, *(score if isfinite(score) else None for score in row)]
                for task, row in zip(record.tasks, record.matrix, strict=True)
            ],
        ),
    }
    if record.frozen:
        sent |= {
            names.BLIP_POSITION: position,
            names.CAPACITY: wandb.Image(figures.capacity_picture(record)),
        }
        for name, layer in record.frozen[-1].layers.items():
            edges = np.arange(len(layer.bits) + 1) - 0.5
            sent[f"{names.BITS}/{name}"] = wandb.Histogram(np_histogram=(np.array(layer.bits), edges))
    logger.log_metrics(sent, step=record.scores[-1].step)


def _wandb_lines(record: RunRecord) -> Any:
    """Return a chart with one line per task, which Weights & Biases draws itself."""
    import wandb

    lines = {
        task: [
            one for one in scores if isfinite(one.score) and isfinite(one.position)
        ]  # a table takes no NaN
        for task, scores in record.scores_by_task.items()
    }
    return wandb.plot.line_series(
        xs=[[one.position for one in scores] for scores in lines.values()],
        ys=[[one.score for one in scores] for scores in lines.values()],
        keys=list(lines),
        title=f"{record.metric} of each task",
        xname="tasks learned",
    )


def _send_to_tensorboard(logger: Any, record: RunRecord) -> None:
    for name, picture in _pictures(record).items():
        logger.experiment.add_figure(name, picture, global_step=record.scores[-1].step)


def _send_to_mlflow(logger: Any, record: RunRecord) -> None:
    for name, picture in _pictures(record).items():
        logger.experiment.log_figure(logger.run_id, picture, f"{name}.png")


def _pictures(record: RunRecord) -> dict[str, Figure]:
    named = {names.CURVES: figures.curves_picture(record), names.MATRIX: figures.matrix_picture(record)}
    return named | ({names.CAPACITY: figures.capacity_picture(record)} if record.frozen else {})


# The function that sends to a logger, by the name of the logger's class.
_SENDERS = {
    "WandbLogger": _send_to_wandb,
    "TensorBoardLogger": _send_to_tensorboard,
    "MLFlowLogger": _send_to_mlflow,
}
