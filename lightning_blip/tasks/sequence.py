"""A sequence of tasks within one fit: the data module that holds the position in it, and how to find it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import pytorch_lightning as pl

from lightning_blip.trainer.classes import LightningDataModule


class NamedTask(Protocol):
    """The attributes that every task has, whether it is learned from a data set or an environment."""

    @property
    def name(self) -> str:
        """The task's name in logs, tables and figures."""

    @property
    def index(self) -> int:
        """The task's position in its sequence, from 0."""


AnyTask = TypeVar("AnyTask", bound=NamedTask)


class TaskSequence(LightningDataModule, Generic[AnyTask]):
    """Base class of the data modules that feed one task after another.

    It keeps the position in the sequence, and saves it in checkpoints. :class:`TaskBoundaries` counts the
    epochs and moves the position. Subclasses add :class:`TaskBoundaries` to the Trainer in ``setup`` and
    provide the loaders. ``train_dataloader`` must read :attr:`task` each time it is called, because a resumed
    fit restores the position after ``setup``.

    Args:
        tasks: The tasks in the order of learning, with indices 0, 1, 2, ….
        epochs: The number of epochs of each task.
        batch_size: The number of samples per batch, in each process.
    """

    def __init__(self, tasks: Sequence[AnyTask], epochs: Sequence[int], batch_size: int) -> None:
        super().__init__()
        self.tasks = list(tasks)
        self.epochs = list(epochs)
        self.batch_size = batch_size
        self.learned = 0
        self.epoch = 0
        #: Whether the restored checkpoint holds the optimizers of the task before the current one.
        self.optimizers_are_stale = False
        self._crossing = False

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> AnyTask:
        return self.tasks[index]

    def __repr__(self) -> str:
        lines = [
            f"  {'>' if task.index == self.learned else ' '} {task}, {epochs} epochs"
            for task, epochs in zip(self.tasks, self.epochs, strict=True)
        ]
        return "\n".join([f"{type(self).__name__}({self.learned} of {len(self)} tasks learned)", *lines])

    __str__ = __repr__

    @property
    def task(self) -> AnyTask:
        """The task being learned; the last task once all are learned."""
        return self.tasks[min(self.learned, len(self) - 1)]

    @property
    def validates(self) -> bool:
        """Whether the tasks can be validated."""
        return True

    @property
    def remaining_epochs(self) -> int:
        """The number of epochs that are left, over the current task and all later ones."""
        return sum(self.epochs[self.learned :]) - self.epoch

    def share_done(self, batches: int, of: float) -> float:
        """Return which share of the current task's training is done, unless the task ends early.

        Args:
            batches: The number of batches of the current epoch that are done.
            of: The number of batches per epoch.

        Returns:
            The share, 0 to 1.
        """
        return (self.epoch + batches / of) / self.epochs[self.task.index]

    def task_dataloader(self) -> Iterable[Any]:
        """Return the batches on which the current task's information is measured, once it is learned."""
        loader: Iterable[Any] = self.train_dataloader()
        return loader

    def end_epoch(self) -> bool:
        """Count an epoch of the current task.

        Returns:
            Whether it was the task's last epoch.
        """
        self.epoch += 1
        return self.epoch >= self.epochs[self.task.index]

    def close_task(self) -> None:
        """Save the current task as learned in checkpoints from now on, although it is still current."""
        self._crossing = True

    def next_task(self) -> bool:
        """Move on to the next task.

        Returns:
            Whether there is a next task.
        """
        self.learned += 1
        self.epoch = 0
        self._crossing = False
        return self.learned < len(self)

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the sequence."""
        if self._crossing:
            return {"learned": self.learned + 1, "epoch": 0, "crossing": True}
        return {"learned": self.learned, "epoch": self.epoch, "crossing": False}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a saved position.

        Raises:
            ValueError: If more tasks were learned than the sequence has.
        """
        if state_dict["learned"] > len(self):
            raise ValueError(
                f"The checkpoint has learned {state_dict['learned']} tasks, this sequence has {len(self)}: "
                "resume with the tasks that the checkpoint was trained on"
            )
        self.learned = state_dict["learned"]
        self.epoch = state_dict["epoch"]
        self.optimizers_are_stale = state_dict["crossing"]


def sequence(trainer: pl.Trainer) -> TaskSequence[Any]:
    """Return the sequence of tasks that a Trainer works on.

    Args:
        trainer: The Trainer.

    Returns:
        The Trainer's data module.

    Raises:
        ValueError: If the data module is not a :class:`TaskSequence`.
    """
    if not has_tasks(trainer):
        datamodule = type(getattr(trainer, "datamodule", None)).__name__
        raise ValueError(
            f"datamodule={datamodule} has no tasks: pass trainer.fit(…, datamodule=TaskSequenceDataModule("
            '[Task("first", train_set, test_set), …])), with your own data sets'
        )
    return trainer.datamodule  # type: ignore[attr-defined, no-any-return]


def has_tasks(trainer: pl.Trainer) -> bool:
    """Return whether a Trainer works on a sequence of tasks.

    Args:
        trainer: The Trainer.

    Returns:
        True if the Trainer's data module is a :class:`TaskSequence`.
    """
    return isinstance(getattr(trainer, "datamodule", None), TaskSequence)


def position(trainer: pl.Trainer) -> float:
    """Return the position of a fit in its sequence, in tasks: i + e/E after e of the E epochs of task i.

    Args:
        trainer: The Trainer.

    Returns:
        The position. It grows within an epoch, too.
    """
    tasks = sequence(trainer)
    batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    index: int = tasks.task.index
    return index + tasks.share_done(batches, trainer.num_training_batches)


def check_names(names: Sequence[str]) -> None:
    """Refuse an empty sequence, and tasks that share a name.

    Args:
        names: The names of the tasks.

    Raises:
        ValueError: If there is no name, or two are the same.
    """
    if not names:
        raise ValueError("tasks=[] is no sequence: give at least one Task")
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise ValueError(
            f"Tasks share the names {twice}: give each task its own name, since logs and curves go by name"
        )
