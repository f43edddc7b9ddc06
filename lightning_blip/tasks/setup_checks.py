"""Checks at the start of a fit: whether the Trainer and the module can work on a sequence of tasks."""

from __future__ import annotations

import inspect
from typing import Any

import pytorch_lightning as pl

from lightning_blip.tasks.heads import task_heads
from lightning_blip.tasks.sequence import TaskSequence
from lightning_blip.trainer.classes import callbacks_of, is_a, overrides
from lightning_blip.trainer.internals import allows_unused_parameters


def check_setup(trainer: pl.Trainer, pl_module: pl.LightningModule, tasks: TaskSequence[Any]) -> None:
    """Refuse callbacks, strategies and validation steps that cannot work on several tasks.

    Args:
        trainer: The Trainer.
        pl_module: The module to be trained.
        tasks: The sequence of tasks.

    Raises:
        ValueError: If a callback takes the whole fit for one task, if the strategy does not allow heads
            without a gradient, or if ``validation_step`` cannot tell the tasks apart.
    """
    _check_callbacks(trainer)
    _check_strategy(trainer, pl_module)
    _check_validation_step(pl_module, tasks)


def _check_callbacks(trainer: pl.Trainer) -> None:
    for callback in callbacks_of(trainer):
        name = type(callback).__name__
        if is_a(callback, "EarlyStopping"):
            arguments = {part: getattr(callback, part) for part in ("monitor", "patience", "mode")}
            given = ", ".join(f"{part}={value!r}" for part, value in arguments.items())
            raise ValueError(f"{name} would end the whole fit with a task: use TaskStopping({given}) instead")
        if is_a(callback, "StochasticWeightAveraging", "WeightAveraging"):
            raise ValueError(
                f"{name} would average weights of different tasks, and undo what is frozen: leave it out; "
                "BLIP averages the end of each task by itself (average=True, the default)"
            )


def _check_strategy(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    several_heads = any(len(heads) > 1 for heads in task_heads(pl_module))
    if several_heads and not allows_unused_parameters(trainer):
        raise ValueError(
            "TaskHeads leaves the heads of other tasks unused, which plain DDP does not allow: "
            "use strategy='ddp_find_unused_parameters_true'"
        )


def _check_validation_step(pl_module: pl.LightningModule, tasks: TaskSequence[Any]) -> None:
    validates = len(tasks) > 1 and tasks.validates and overrides(pl_module, "validation_step")
    if validates and "dataloader_idx" not in inspect.signature(pl_module.validation_step).parameters:
        raise ValueError(
            f"{type(pl_module).__name__}.validation_step will be run on each of {len(tasks)} tasks: give it "
            "the argument dataloader_idx=0"
        )
