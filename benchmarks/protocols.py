"""The streams: which tasks, learned by which network, how."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import data
from benchmarks.networks import Classifier, mlp
from lightning_blip import Task, TaskHeads, TaskSequenceDataModule
from lightning_blip.streams import MappedDataset, permute_inputs, split_classes

Network = tuple[nn.Module, nn.Module]


@dataclass(frozen=True)
class Protocol:
    """A stream of tasks and how it is learned.

    Attributes:
        name: Of the stream.
        description: In one line.
        dataset: Name of the data, in :mod:`benchmarks.data`.
        make_tasks: From training set, test set, the number of tasks and a seed to the tasks.
        network: From the number of tasks to the body and the head of a network.
        optimizer: Makes the optimizer from the parameters.
        tasks: How many there are.
        epochs: How long each is trained.
        batch_size: In training.
        standardise: Whether pixels have mean 0 and deviation 1, else they are in [0, 1].
        metric: What the network logs in validation; a share, higher is better.
    """

    name: str
    description: str
    dataset: str
    make_tasks: Callable[[TensorDataset, TensorDataset, int, int], list[Task]]
    network: Callable[[int], Network]
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    tasks: int
    epochs: int
    batch_size: int
    standardise: bool = False
    metric: str = "val_acc"

    def stream(self, folder: Path, seed: int) -> TaskSequenceDataModule:
        """The tasks, to be learned.

        Args:
            folder: Where the data lies.
            seed: Of the tasks and of the order of their samples.

        Returns:
            The data module.

        Raises:
            FileNotFoundError: If the data is not there.
            ValueError: If the data does not give that many tasks.
        """
        train, test = data.load(folder, self.dataset, self.standardise)
        return _Stream(
            self.make_tasks(train, test, self.tasks, seed),
            epochs_per_task=self.epochs,
            batch_size=self.batch_size,
            seed=seed,
        )

    def module(self) -> Classifier:
        """The network, its parameters drawn from torch's global random numbers."""
        return Classifier(*self.network(self.tasks), self.optimizer)


class _Stream(TaskSequenceDataModule):
    """A sequence of tasks held in memory, which is validated in batches larger than those of training."""

    def val_dataloader(self) -> list[DataLoader[Any]]:
        seen = self.tasks[: self.task.index + 1]
        return [_in_large_batches(cast(MappedDataset, task.val)) for task in seen]


def _in_large_batches(samples: MappedDataset) -> DataLoader[Any]:
    indices = cast(Any, torch.arange(len(samples)).split(2_000))
    return DataLoader(indices, batch_size=None, collate_fn=cast(Any, samples.batch))


def _pairs(train: TensorDataset, test: TensorDataset, tasks: int, _seed: int) -> list[Task]:
    """The first tasks of two classes each, whatever the seed."""
    pairs = split_classes(train, test, classes_per_task=2)
    if tasks > len(pairs):
        raise ValueError(f"tasks={tasks} is more than the {len(pairs)} pairs of classes")
    return pairs[:tasks]


def _shared_head(classes: int, *hidden: int) -> Callable[[int], Network]:
    return lambda _tasks: (mlp(784, *hidden), nn.Linear(hidden[-1], classes))


def _head_a_task(classes: int, *hidden: int) -> Callable[[int], Network]:
    return lambda tasks: (mlp(784, *hidden), TaskHeads(hidden[-1], classes=[classes] * tasks))


_PERMUTED = Protocol(
    "permuted_mnist",
    "10 permutations of MNIST, one shared head, MLP 784-100-100-10, SGD 0.01, batch 10, 5 epochs a task",
    dataset="mnist",
    make_tasks=permute_inputs,
    network=_shared_head(10, 100, 100),
    optimizer=partial(SGD, lr=0.01),
    tasks=10,
    epochs=5,
    batch_size=10,
)
_PERMUTED_HEADS = Protocol(
    "permuted_mnist_heads",
    "10 permutations of MNIST, a head each, MLP 784-1200, SGD 0.01, batch 64, 5 epochs a task",
    dataset="mnist",
    make_tasks=permute_inputs,
    network=_head_a_task(10, 1200),
    optimizer=partial(SGD, lr=0.01),
    tasks=10,
    epochs=5,
    batch_size=64,
    standardise=True,
)

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        _PERMUTED,
        replace(
            _PERMUTED,
            name="permuted_mnist_20",
            description="permuted_mnist with 20 permutations",
            tasks=20,
        ),
        _PERMUTED_HEADS,
        replace(
            _PERMUTED_HEADS,
            name="permuted_mnist_heads_adam",
            description="permuted_mnist_heads with Adam 1e-3 and 20 epochs a task",
            optimizer=partial(Adam, lr=1e-3),
            epochs=20,
        ),
        Protocol(
            "split_mnist",
            "MNIST in 5 pairs of classes, a head each, MLP 784-1200, SGD 0.01, batch 64, 3 epochs a task",
            dataset="mnist",
            make_tasks=_pairs,
            network=_head_a_task(2, 1200),
            optimizer=partial(SGD, lr=0.01),
            tasks=5,
            epochs=3,
            batch_size=64,
            standardise=True,
        ),
        Protocol(
            "split_fashion",
            "Fashion-MNIST in 5 pairs of classes, one shared head of two, MLP 784-100-100-2, SGD 0.01, "
            "batch 10, 5 epochs a task",
            dataset="fashion_mnist",
            make_tasks=_pairs,
            network=_shared_head(2, 100, 100),
            optimizer=partial(SGD, lr=0.01),
            tasks=5,
            epochs=5,
            batch_size=10,
        ),
    )
}
