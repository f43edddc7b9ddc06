"""The data module that feeds a sequence of tasks, one after another, within one fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypedDict, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset
from typing_extensions import Unpack

from lightning_blip.tasks import streams
from lightning_blip.tasks.sequence import TaskSequence, check_names
from lightning_blip.tasks.streams import MappedDataset, Samples, Task
from lightning_blip.trainer import processes
from lightning_blip.trainer.random_state import generator_of


class LoadingOptions(TypedDict, total=False):
    """The arguments of :class:`TaskSequenceDataModule` that every way to make one takes."""

    epochs_per_task: int | Sequence[int]
    batch_size: int
    num_workers: int
    val_fraction: float
    seed: int


class TaskSequenceDataModule(TaskSequence[Task]):
    """Feeds tasks one after another: one ``trainer.fit`` learns the whole sequence.

    ``train_dataloader`` gives the current task; ``val_dataloader`` one loader for each task seen so far, so
    that the module's own ``validation_step`` is run on each of them; ``test_dataloader``, and
    ``predict_dataloader`` on the same samples, one for every task.
    It brings the :class:`TaskBoundaries` callback along, sets the number of epochs, and keeps its position in
    the checkpoint: a fit resumed with ``ckpt_path`` goes on at the right batch of the right epoch of the
    right task, over the samples in the order that the unbroken fit would have seen.

    Args:
        tasks: The tasks, in the order of learning.
        epochs_per_task: How long each task is trained: one number, or one a task.
        batch_size: Samples a batch, of each process.
        num_workers: Processes that load data.
        val_fraction: The share of each training set that is held out, to validate on instead of the test set.
        seed: Of the order of the samples, which depends on it, the task and the epoch alone.

    Raises:
        ValueError: If there is no task, one has no data, two share a name, only some can be validated, or
            an argument is off.

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
            raise ValueError(f"val_fraction={val_fraction} must be a share of the training set, 0 to below 1")
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
        """One task for every few classes, see :func:`lightning_blip.tasks.streams.split_classes`."""
        return cls(streams.split_classes(train, test, classes_per_task, relabel), **options)

    @classmethod
    def permute_inputs(
        cls, train: Samples, test: Samples, *, tasks: int = 10, **options: Unpack[LoadingOptions]
    ) -> TaskSequenceDataModule:
        """The same data, permuted: see :func:`lightning_blip.tasks.streams.permute_inputs`."""
        return cls(streams.permute_inputs(train, test, tasks, options.get("seed", 0)), **options)

    @classmethod
    def rotate(
        cls, train: Samples, test: Samples, *, degrees: Sequence[float], **options: Unpack[LoadingOptions]
    ) -> TaskSequenceDataModule:
        """The same images rotated, see :func:`lightning_blip.tasks.streams.rotate`."""
        return cls(streams.rotate(train, test, degrees), **options)

    @classmethod
    def chain(
        cls,
        datasets: Sequence[tuple[Samples, Samples]],
        *,
        names: Sequence[str] | None = None,
        **options: Unpack[LoadingOptions],
    ) -> TaskSequenceDataModule:
        """One task a data set, see :func:`lightning_blip.tasks.streams.chain`."""
        return cls(streams.chain(datasets, names), **options)

    @property
    def validates(self) -> bool:
        """Whether the tasks have validation sets."""
        return self.tasks[0].val is not None

    def train_dataloader(self) -> DataLoader[Any]:
        """The current task, its samples in the order of this epoch; in each process a part of them."""
        # Chosen here, not in setup: a resumed fit restores the position in between.
        key = (self.seed, self.task.index, self.epoch)
        return self._loader(self.task.train, _EpochOrder(cast(Any, self.task.train), key))

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """One loader for each task seen so far, the current one last."""
        return self._in_order([task.val for task in self.tasks[: self.task.index + 1]])

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """One loader for every task, learned or not."""
        return self._in_order([task.test for task in self.tasks])

    predict_dataloader = test_dataloader

    def _in_order(self, parts: Sequence[Samples | None]) -> list[DataLoader[Any]]:
        return [self._loader(samples, None) for samples in parts if samples is not None]

    def _loader(self, samples: Samples, order: _EpochOrder | None) -> DataLoader[Any]:
        held = MappedDataset(samples) if isinstance(samples, TensorDataset) else samples
        collate: Callable[[Any], Any] | None = None
        if isinstance(held, MappedDataset) and held.in_memory:
            held, collate = _Batches(held), _as_it_is
        kind = DataLoader[Any] if order is None else _EpochLoader
        return kind(
            held,
            batch_size=self.batch_size,
            sampler=order,
            num_workers=self.num_workers,
            collate_fn=collate,
            # Of its own: else each loader would draw from the global random numbers, how often depends on
            # whether a fit was resumed.
            generator=generator_of(order.key if order else (self.seed,)),
        )


class _EpochOrder(DistributedSampler[Any]):
    """A random order of the samples that depends on its key (seed, task, epoch) alone.

    Each process has every so-many-th of them; a few come twice, so that all have as many.
    """

    def __init__(self, samples: Dataset[Any], key: tuple[int, int, int]) -> None:
        rank, processes_ = processes.rank_and_world_size()
        super().__init__(samples, processes_, rank, shuffle=False)
        self.key = key
        self.skipped = 0

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(len(cast(Any, self.dataset)), generator=generator_of(self.key))
        repeated = order.repeat(-(-self.total_size // len(order)))[: self.total_size]
        yield from repeated[self.rank :: self.num_replicas][self.skipped :].tolist()


class _EpochLoader(DataLoader[Any]):
    """A loader that goes on after the batches given when a checkpoint was saved within its epoch."""

    _given = 0

    def __iter__(self) -> Any:
        self._given = getattr(self.sampler, "skipped", 0) // cast(int, self.batch_size)
        for batch in super().__iter__():
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Which epoch it is of, and how much of it was given."""
        return {"key": getattr(self.sampler, "key", None), "given": self._given}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where a loader of the same epoch was; one of another begins."""
        if isinstance(self.sampler, _EpochOrder) and state_dict["key"] == self.sampler.key:
            self.sampler.skipped = state_dict["given"] * cast(int, self.batch_size)


class _Batches(Dataset[Any]):
    """Samples held as tensors, read by the loader a batch at a time."""

    def __init__(self, samples: MappedDataset) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self._samples.batch(torch.tensor(indices))


def _as_it_is(batch: Any) -> Any:
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
