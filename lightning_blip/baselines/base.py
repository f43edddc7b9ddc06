"""The base class of the methods: it refuses, at the start of a fit, what a method cannot work with."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from itertools import islice
from typing import Any

import pytorch_lightning as pl
from torch import nn

from lightning_blip.tasks.sequence import sequence
from lightning_blip.trainer.classes import Callback
from lightning_blip.trainer.task_batches import TaskBatches


class Baseline(Callback):
    """A method against forgetting that learns a sequence of tasks with one optimizer, in one process.

    Raises:
        ValueError: In a fit, if the data module has no tasks, there is not exactly one optimizer, there are
            several processes, or what the method measures cannot be measured on the first batch.
    """

    _tried = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the data module and the number of processes."""
        if stage != "fit":
            return
        sequence(trainer)
        if trainer.world_size > 1:
            raise ValueError(
                f"{type(self).__name__} works in one process, and the Trainer has {trainer.world_size}: "
                "give the Trainer devices=1, num_nodes=1"
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the number of optimizers."""
        self._tried = False
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"{type(self).__name__} works with one optimizer, and {type(pl_module).__name__} has "
                f"{len(trainer.optimizers)}: return one from configure_optimizers"
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Try on the first batch of a fit what is measured at the end of each task."""
        if self._tried:
            return
        self._tried = True
        try:
            self._try_on(pl_module, batch)
        except Exception as error:
            raise ValueError(
                f"{type(self).__name__} cannot measure what it needs of {type(pl_module).__name__}, tried on "
                f"two samples of the first batch: {error}"
            ) from error

    def _try_on(self, pl_module: pl.LightningModule, batch: Any) -> None:
        """Measure two samples of a batch; a method that measures nothing does nothing here."""


def task_batches(trainer: pl.Trainer) -> Iterable[tuple[Any, Any]]:
    """Return the training batches of the current task, once each, as ``training_step`` gets them.

    Args:
        trainer: The Trainer.

    Returns:
        Pairs of inputs and targets.
    """
    loader = sequence(trainer).task_dataloader()
    batches = TaskBatches(loader, trainer)
    return islice(batches, len(loader)) if isinstance(loader, Sized) else batches


def part_of(module: nn.Module, name: str, argument: str) -> nn.Module:
    """Return a submodule by name.

    Args:
        module: The module.
        name: The name of the submodule, such as ``"body"`` or ``"model.encoder"``.
        argument: The argument that the name was given as, for the message.

    Returns:
        The submodule.

    Raises:
        ValueError: If there is no such submodule.

    Example:
        >>> part_of(nn.ModuleDict({"encoder": nn.Linear(4, 2)}), "body", "body")
        Traceback (most recent call last):
        ValueError: body='body' is no part of ModuleDict: give the name of one of its parts, such as encoder
    """
    parts: dict[str, nn.Module] = dict(module.named_modules())
    if not name or name not in parts:
        children = ", ".join(child for child, _ in module.named_children())
        raise ValueError(
            f"{argument}={name!r} is no part of {type(module).__name__}: give the name of one of its parts, "
            f"such as {children}"
        )
    return parts[name]


def check_full_precision(method: str, trainer: pl.Trainer) -> None:
    """Check that a Trainer does not train in mixed precision.

    Args:
        method: The name of the method, for the message.
        trainer: The Trainer.

    Raises:
        ValueError: If it does.
    """
    if "mixed" in str(trainer.precision):
        raise ValueError(
            f"{method} does not work in mixed precision, as in precision={trainer.precision!r}: give the "
            "Trainer precision='32-true'"
        )
