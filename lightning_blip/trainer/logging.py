"""Metrics sent to the loggers of a Trainer, and the axis that Weights & Biases draws them over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytorch_lightning as pl

from lightning_blip.trainer.classes import is_a
from lightning_blip.trainer.internals import metric_prefix, optimizer_steps


def log_metrics(trainer: pl.Trainer, metrics: Mapping[str, float]) -> None:
    """Send metrics to all loggers now, at the current step.

    Args:
        trainer: The Trainer.
        metrics: Values by name.
    """
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=optimizer_steps(trainer))


def wandb_loggers(trainer: pl.Trainer) -> list[Any]:
    """Return the loggers of a Trainer that log to Weights & Biases; outside rank 0 they do nothing.

    Args:
        trainer: The Trainer.

    Returns:
        The loggers.

    Example:
        >>> wandb_loggers(pl.Trainer(logger=False, enable_checkpointing=False))
        []
    """
    return [logger for logger in trainer.loggers if is_a(logger, "WandbLogger")]


def define_axis(trainer: pl.Trainer, group: str, names: Iterable[str]) -> None:
    """Make the position in the sequence the x axis of metrics in Weights & Biases, instead of the step.

    Args:
        trainer: The Trainer.
        group: The first part of the metrics' names; ``<group>/position`` is logged with them.
        names: The rest of each name. Every metric is listed, because a pattern would compete with the
            logger's own pattern "*".
    """
    for logger in wandb_loggers(trainer):
        begin = f"{metric_prefix(logger)}{group}"
        logger.experiment.define_metric(f"{begin}/position", hidden=True)
        for name in names:
            if "*" not in name:  # Weights & Biases would read the name as a pattern
                logger.experiment.define_metric(f"{begin}/{name}", step_metric=f"{begin}/position")
