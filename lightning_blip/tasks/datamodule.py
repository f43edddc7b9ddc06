"""The data module that feeds data sets as a sequence of tasks within one fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypedDict, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset
from typing_extensions import Unpack

from lightning_blip.tasks import streams
from lightning_blip.tasks.boundaries import add_boundaries
from lightning_blip.tasks.sequence import TaskSequence, check_names
from lightning_blip.tasks.task import MappedDataset, Samples, Task
from lightning_blip.trainer import processes
from lightning_blip.trainer.random_state import generator_of


class LoadingOptions(TypedDict, total=False):
    """The arguments of :class:`TaskSequenceDataModule` that all its constructors share."""

    epochs_per_task: int | Sequence[int]
    batch_size: int
    num_workers: int
    val_fraction: float
    seed: int


class TaskSequenceDataModule(TaskSequence[Task]):
    """Feed tasks one after another, so that one ``trainer.fit`` learns the whole sequence.

    ``train_dataloader`` returns the loader of the current task. ``val_dataloader`` returns one loader for
    each task seen so far, so that the module's own ``validation_step`` runs on each of them.
    ``test_dataloader`` returns one loader for every task, and ``predict_dataloader`` the same loaders.

    The data module adds the :class:`TaskBoundaries` callback, sets the number of epochs, and saves its
    position in checkpoints: a fit resumed with ``ckpt_path`` continues at the right batch of the right epoch
    of the right task, with the samples in the same order as in an unbroken fit.

    Args:
        tasks: The tasks, in the order of learning.
        epochs_per_task: The number of epochs: one number for all tasks, or one per task.
        batch_size: The number of samples per batch, in each process.
        num_workers: The number of worker processes that load data.
        val_fraction: The share of each training set that is held out for validation, instead of validating
            on the test set.
        seed: The seed of the order of samples, which depends on nothing but the seed, the task and the epoch.

    Raises:
        ValueError: If there is no task, a task has no data, two tasks share a name, only some tasks can be
            validated, or an argument is invalid.

    Example:
        >>> digits = TensorDataset(torch.zeros(40, 8), torch.arange(40) % 10)
        >>> tasks = TaskSequenceDataModule.split_classes(digits, digits, classes_per_task=5)
        >>> len(tasks)
        2
        >>> tasks[1]
        Task('5-6-7-8-9', classes=[5, 6, 7, 8, 9], train=20, val=20, test=20)
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        epochs_per_task: int | Sequence[int] = 1,
        batch_size: int = 64,
        num_workers: int = 0,
        val_fraction: float = 0.0,
        seed: int = 0,
    ) -> None:
        if not 0.0 <= val_fraction < 1.0:
            raise ValueError(
                f"val_fraction={val_fraction} must be a share of the training set, 0 or more and below 1"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        _check_tasks(tasks)
        if val_fraction:
            tasks = [streams.hold_out(task, val_fraction, seed) for task in tasks]
            _check_tasks(tasks)
        tasks = [replace(task, index=index) for index, task in enumerate(tasks)]
        super().__init__(tasks, _epochs(epochs_per_task, len(tasks)), batch_size)
        self.num_workers = num_workers
        self.seed = seed

    @classmethod
    def split_classes(
        cls,
        train: Samples,
        test: Samples,
        *,
        classes_per_task: int = 2,
        relabel: bool = True,
        **options: Unpack[LoadingOptions],
    ) -> TaskSequenceDataModule:
        """Divide the classes among tasks, see :func:`lightning_blip.tasks.streams.split_classes`."""
        return cls(streams.split_classes(train, test, classes_per_task, relabel), **options)

    @classmethod
    def permute_inputs(
        cls, train: Samples, test: Samples, *, tasks: int = 10, **options: Unpack[LoadingOptions]
    ) -> TaskSequenceDataModule:
        """Permute the inputs per task, see :func:`lightning_blip.tasks.streams.permute_inputs`."""
        return cls(streams.permute_inputs(train, test, tasks, options.get("seed", 0)), **options)

    @classmethod
    def rotate(
        cls, train: Samples, test: Samples, *, degrees: Sequence[float], **options: Unpack[LoadingOptions]
    ) -> TaskSequenceDataModule:
        """Rotate the images per task, see :func:`lightning_blip.tasks.streams.rotate`."""
        return cls(streams.rotate(train, test, degrees), **options)

    @classmethod
    def chain(
        cls,
        datasets: Sequence[tuple[Samples, Samples]],
        *,
        names: Sequence[str] | None = None,
        **options: Unpack[LoadingOptions],
    ) -> TaskSequenceDataModule:
        """Make one task per data set, see :func:`lightning_blip.tasks.streams.chain`."""
        return cls(streams.chain(datasets, names), **options)

    @property
    def validates(self) -> bool:
        """Whether the tasks have validation sets."""
        return self.tasks[0].val is not None

    def setup(self, stage: str) -> None:
        """Add the :class:`TaskBoundaries` callback to the Trainer."""
        assert self.trainer is not None
        add_boundaries(self.trainer)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the current task's loader: this process's part of the samples, in the epoch's order."""
        # The task is read here, not in setup, because a resumed fit restores the position in between.
        key = (self.seed, self.task.index, self.epoch)
        return self._loader(self.task.train, _EpochOrder(cast(Any, self.task.train), key))

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Return one loader for each task seen so far, that of the current task last."""
        return self._in_order([task.val for task in self.tasks[: self.task.index + 1]])

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Return one loader for every task, whether learned or not."""
        return self._in_order([task.test for task in self.tasks])

    predict_dataloader = test_dataloader

    def _in_order(self, parts: Sequence[Samples | None]) -> list[DataLoader[Any]]:
        return [self._loader(samples, None) for samples in parts if samples is not None]

    def _loader(self, samples: Samples, order: _EpochOrder | None) -> DataLoader[Any]:
        held = MappedDataset(samples) if isinstance(samples, TensorDataset) else samples
        collate: Callable[[Any], Any] | None = None
        if isinstance(held, MappedDataset) and held.in_memory:
            held, collate = _Batches(held), _unchanged
        kind = DataLoader[Any] if order is None else _EpochLoader
        return kind(
            held,
            batch_size=self.batch_size,
            sampler=order,
            num_workers=self.num_workers,
            collate_fn=collate,
            # Without its own generator a loader draws from the global one, more often in a resumed fit.
            generator=generator_of(order.key if order else (self.seed,)),
        )


class _EpochOrder(DistributedSampler[Any]):
    """A random order of the samples that depends on nothing but its key (seed, task, epoch).

    With n processes, each gets every n-th sample; a few samples are repeated so that all get equally many.
    """

    def __init__(self, samples: Dataset[Any], key: tuple[int, int, int]) -> None:
        rank, world_size = processes.rank_and_world_size()
        super().__init__(samples, world_size, rank, shuffle=False)
        self.key = key
        self.skipped = 0

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(len(cast(Any, self.dataset)), generator=generator_of(self.key))
        repeated = order.repeat(-(-self.total_size // len(order)))[: self.total_size]
        yield from repeated[self.rank :: self.num_replicas][self.skipped :].tolist()


class _EpochLoader(DataLoader[Any]):
    """A loader that continues after the batches it had given when a checkpoint was saved within the epoch."""

    _given = 0

    def __iter__(self) -> Any:
        self._given = getattr(self.sampler, "skipped", 0) // cast(int, self.batch_size)
        for batch in super().__iter__():
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the key of the loader's epoch, and the number of batches given."""
        return {"key": getattr(self.sampler, "key", None), "given": self._given}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Skip the batches that were given, if the saved loader was of the same epoch."""
        if isinstance(self.sampler, _EpochOrder) and state_dict["key"] == self.sampler.key:
            self.sampler.skipped = state_dict["given"] * cast(int, self.batch_size)


class _Batches(Dataset[Any]):
    """Samples held as tensors; the loader reads a whole batch at once."""

    def __init__(self, samples: MappedDataset) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self._samples.batch(torch.tensor(indices))


def _unchanged(batch: Any) -> Any:
    return batch


def _check_tasks(tasks: Sequence[Task]) -> None:
    check_names([task.name for task in tasks])
    for task in tasks:
        for part in ("train", "val", "test"):
            samples = getattr(task, part)
            if samples is not None and len(samples) == 0:
                raise ValueError(f"Task {task.name!r} has no data in its {part} set: leave the task out")
    for part in ("val", "test"):
        without = [task.name for task in tasks if getattr(task, part) is None]
        if without and len(without) < len(tasks):
            raise ValueError(f"Tasks {without} have no {part} set while others do: give it to all or to none")


def _epochs(epochs_per_task: int | Sequence[int], tasks: int) -> list[int]:
    epochs = [epochs_per_task] * tasks if isinstance(epochs_per_task, int) else list(epochs_per_task)
    if len(epochs) != tasks or min(epochs) < 1:
        raise ValueError(
            f"epochs_per_task={epochs_per_task} must be one number, or one for each of the {tasks} tasks, "
            "at least 1 each"
        )
    return epochs
