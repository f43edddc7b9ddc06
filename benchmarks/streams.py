"""The tasks of the streams, made from data sets by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import data
from benchmarks.data.looks import Look, coloured, upright
from lightning_blip import Task, TaskSequenceDataModule
from lightning_blip.tasks.streams import chain, permute_inputs, rotate, split_classes
from lightning_blip.tasks.task import MappedDataset

Loader = Callable[[str, Look], tuple[TensorDataset, TensorDataset]]

#: Makes the tasks from a function that loads a data set by name, the number of tasks and a seed.
MakeTasks = Callable[[Loader, int, int], list[Task]]


class Stream(TaskSequenceDataModule):
    """A sequence of tasks in memory, validated in batches that fit into the caches of a processor.

    Args:
        folder: The folder of the data.
        make_tasks: An object of one of the classes of this file.
        tasks: The number of tasks.
        epochs_per_task: The number of epochs per task.
        batch_size: The batch size in training.
        seed: The seed of the tasks and of the order of their samples.

    Raises:
        FileNotFoundError: If the data is not there.
        ValueError: If the stream has fewer tasks.
    """

    def __init__(
        self,
        folder: Path,
        make_tasks: MakeTasks,
        tasks: int,
        epochs_per_task: int,
        batch_size: int,
        seed: int = 0,
    ) -> None:
        made = make_tasks(partial(data.load, Path(folder)), tasks, seed)
        if tasks > len(made):
            raise ValueError(f"tasks={tasks} is more than the {len(made)} that this stream has")
        super().__init__(made[:tasks], epochs_per_task=epochs_per_task, batch_size=batch_size, seed=seed)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Return one loader for each task seen so far."""
        seen = self.tasks[: self.task.index + 1]
        return [_in_batches(cast(MappedDataset, task.val)) for task in seen]


def _in_batches(samples: MappedDataset) -> DataLoader[Any]:
    # 65 images of CIFAR: a convolution of 2,000 exceeds the caches and takes twice as long per image.
    size = max(32, 200_000 // samples[0][0].numel())
    indices = cast(Any, torch.arange(len(samples)).split(size))
    return DataLoader(indices, batch_size=None, collate_fn=cast(Any, samples.batch))


@dataclass(frozen=True)
class Split:
    """Tasks of a few classes each, in their order or in an order drawn from the seed."""

    dataset: str
    look: Look
    classes_per_task: int = 2
    drawn: bool = False

    def __call__(self, load: Loader, tasks: int, seed: int) -> list[Task]:
        """Return all tasks."""
        parts = load(self.dataset, self.look)
        if not self.drawn:
            return split_classes(*parts, self.classes_per_task)
        order = torch.from_numpy(_order(len(parts[0].tensors[1].unique()), seed))
        places = order.argsort()
        train, test = (TensorDataset(x, places[y]) for x, y in (part.tensors for part in parts))
        return [_named_by_classes(task, order) for task in split_classes(train, test, self.classes_per_task)]


def _named_by_classes(task: Task, order: Tensor) -> Task:
    classes = tuple(order[list(task.classes)].tolist())
    return replace(task, name="-".join(map(str, classes)), classes=classes)


def _order(length: int, seed: int) -> Any:
    # The generator of the paper's code, so that a seed gives the same order as there.
    return np.random.RandomState(seed).permutation(length)


@dataclass(frozen=True)
class Permuted:
    """Permutations of MNIST's pixels, drawn from the seed."""

    look: Look

    def __call__(self, load: Loader, tasks: int, seed: int) -> list[Task]:
        """Return the first tasks."""
        return permute_inputs(*load("mnist", self.look), tasks, seed)


@dataclass(frozen=True)
class Rotated:
    """MNIST rotated by 0 degrees, ``step``, 2 · ``step`` and so on."""

    step: float

    def __call__(self, load: Loader, tasks: int, seed: int) -> list[Task]:
        """Return the first tasks."""
        return rotate(*load("mnist", upright), degrees=[self.step * i for i in range(tasks)])


@dataclass(frozen=True)
class AlternatingCifar:
    """Two classes of CIFAR-10 and twenty of CIFAR-100, alternating."""

    def __call__(self, load: Loader, tasks: int, seed: int) -> list[Task]:
        """Return all ten tasks."""
        pairs = split_classes(*load("cifar10", coloured), classes_per_task=2)
        twenties = split_classes(*load("cifar100", coloured), classes_per_task=20)
        return [
            replace(task, name=f"{name} {task.classes[0]}-{task.classes[-1]}")
            for both in zip(pairs, twenties, strict=True)
            for name, task in zip(("CIFAR-10", "CIFAR-100"), both, strict=True)
        ]


@dataclass(frozen=True)
class Chained:
    """One data set per task, in colour, in the given order or in an order drawn from the seed."""

    datasets: Sequence[str]
    drawn: bool = False

    def __call__(self, load: Loader, tasks: int, seed: int) -> list[Task]:
        """Return the first tasks, at most one per data set."""
        order = _order(len(self.datasets), seed) if self.drawn else range(len(self.datasets))
        names = [self.datasets[i] for i in order][:tasks]
        return chain([load(name, coloured) for name in names], names=names)
