"""A sequence of tasks within one fit: the position in it, which its data module keeps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from lightning_blip.tasks.boundaries import TaskBoundaries
from lightning_blip.trainer.classes import LightningDataModule, callbacks_of


class NamedTask(Protocol):
    """What every task has, whatever it is learned from."""

    @property
    def name(self) -> str:
        """How the task is called in logs, tables and pictures."""

    @property
    def index(self) -> int:
        """Its place in the sequence, from 0."""


AnyTask = TypeVar("AnyTask", bound=NamedTask)


class TaskSequence(LightningDataModule, Generic[AnyTask]):
    """What data modules have in common that feed one task after another.

    It brings the :class:`TaskBoundaries` callback along, which counts the epochs and moves on, and keeps its
    position in the checkpoint. Those that derive from it give the loaders: ``train_dataloader`` is that of
    :attr:`task`, chosen when it is asked for, since a resumed fit restores the position after ``setup``.

    Args:
        tasks: The tasks, in the order of learning, their indices counting up from 0.
        epochs: How long each of them is trained.
        batch_size: Samples a batch, of each process.
    """

    def __init__(self, tasks: Sequence[AnyTask], epochs: Sequence[int], batch_size: int) -> None:
        super().__init__()
        self.tasks = list(tasks)
        self.epochs = list(epochs)
        self.batch_size = batch_size
        self.learned = 0
        self.epoch = 0
        #: Whether a checkpoint was restored that holds the optimizers of the task before.
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
        """The task being learned; the last one when all are."""
        return self.tasks[min(self.learned, len(self) - 1)]

    @property
    def validates(self) -> bool:
        """Whether there is anything to validate on."""
        return True

    @property
    def remaining_epochs(self) -> int:
        """How many epochs are left, over all tasks to come."""
        return sum(self.epochs[self.learned :]) - self.epoch

    def share_done(self, batches: int, of: float) -> float:
        """The share of the current task's training that is done, 0 to 1, if it is not ended early.

        Args:
            batches: How many of the current epoch are done.
            of: How many an epoch has.

        Returns:
            The share.
        """
        return (self.epoch + batches / of) / self.epochs[self.task.index]

    def setup(self, stage: str) -> None:
        """Puts the owner of the boundaries in its place."""
        trainer = self.trainer
        assert trainer is not None
        callbacks = callbacks_of(trainer)
        if not any(isinstance(callback, TaskBoundaries) for callback in callbacks):
            callbacks.insert(0, TaskBoundaries())
        trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]

    def task_dataloader(self) -> Iterable[Any]:
        """The batches that the current task's information is measured on, once it is learned."""
        loader: Iterable[Any] = self.train_dataloader()
        return loader

    def end_epoch(self) -> bool:
        """Counts an epoch of the current task.

        Returns:
            Whether it was the task's last.
        """
        self.epoch += 1
        return self.epoch >= self.epochs[self.task.index]

    def close_task(self) -> None:
        """From here on a checkpoint says that the current task is learned, though it is still shown."""
        self._crossing = True

    def next_task(self) -> bool:
        """Moves on to the next task.

        Returns:
            Whether there is one.
        """
        self.learned += 1
        self.epoch = 0
        self._crossing = False
        return self.learned < len(self)

    def state_dict(self) -> dict[str, Any]:
        """The position in the sequence."""
        if self._crossing:
            return {"learned": self.learned + 1, "epoch": 0, "crossing": True}
        return {"learned": self.learned, "epoch": self.epoch, "crossing": False}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes back to a saved position."""
        if state_dict["learned"] > len(self):
            raise ValueError(
                f"The checkpoint has learned {state_dict['learned']} tasks, this sequence has {len(self)}: "
                "resume with the tasks that it was trained on"
            )
        self.learned = state_dict["learned"]
        self.epoch = state_dict["epoch"]
        self.optimizers_are_stale = state_dict["crossing"]


def check_names(names: Sequence[str]) -> None:
    """Refuses a sequence of no tasks, and tasks that cannot be told apart.

    Args:
        names: Of the tasks.

    Raises:
        ValueError: If there is none, or two are the same.
    """
    if not names:
        raise ValueError("tasks=[] is no sequence: give at least one Task")
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise ValueError(f"Tasks share the names {twice}: logs and curves go by name, give each its own")
