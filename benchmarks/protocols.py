"""The streams: which tasks, learned by which network, how."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer

from benchmarks.data.looks import coloured, flat, padded, standardised
from benchmarks.networks import Classifier, alexnet, flattening_mlp, mini_imagenet_resnet18, mlp
from benchmarks.streams import AlternatingCifar, Chained, MakeTasks, Permuted, Rotated, Split, Stream
from lightning_blip import TaskHeads, TaskSequenceDataModule

Network = tuple[nn.Module, nn.Module]


@dataclass(frozen=True)
class Protocol:
    """A stream of tasks and how it is learned.

    Attributes:
        name: Of the stream.
        description: In one line.
        make_tasks: See :class:`Stream`.
        network: From the number of tasks to the body and the head of a network.
        optimizer: Makes the optimizer from the parameters.
        tasks: How many there are.
        epochs: How long each is trained.
        batch_size: In training.
        source: Whose settings these are, and where they had to be chosen.
        metric: What the network logs in validation; a share, higher is better.
    """

    name: str
    description: str
    make_tasks: MakeTasks
    network: Callable[[int], Network]
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    tasks: int
    epochs: int
    batch_size: int
    source: str
    metric: str = "val_acc"

    @property
    def save_every(self) -> int:
        """In epochs: after each task."""
        return self.epochs

    @property
    def validate_every(self) -> int:
        """In epochs: never, but at the boundaries, which validate by themselves."""
        return self.tasks * self.epochs + 1

    @property
    def ceilings(self) -> None:
        """None: 100 % is a share of 1."""

    def stream(self, folder: Path, seed: int) -> TaskSequenceDataModule:
        """The tasks, to be learned.

        Args:
            folder: Where the data lies.
            seed: Of the tasks and of the order of their samples.

        Returns:
            The data module.

        Raises:
            FileNotFoundError: If the data is not there.
            ValueError: If the stream does not have that many tasks.
        """
        return Stream(folder, self.make_tasks, self.tasks, self.epochs, self.batch_size, seed)

    def module(self) -> Classifier:
        """The network, its parameters drawn from torch's global random numbers."""
        # On two cores convolutions take a quarter less time so.
        return Classifier(*self.network(self.tasks), self.optimizer).to(memory_format=torch.channels_last)

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process finds the functions by the stream's name.
        return _of_length, (self.name, self.tasks, self.epochs)


def _of_length(name: str, tasks: int, epochs: int) -> Protocol:
    return replace(PROTOCOLS[name], tasks=tasks, epochs=epochs)


def _shared_head(classes: int, *sizes: int) -> Callable[[int], Network]:
    return lambda _tasks: (mlp(sizes), nn.Linear(sizes[-1], classes))


def _with_heads(body: Callable[[], nn.Module], outputs: int, *classes: int) -> Callable[[int], Network]:
    """A body with so many outputs, and a head a task, of one number of classes or of several by turns."""
    return lambda tasks: (
        body(),
        TaskHeads(outputs, classes=[classes[i % len(classes)] for i in range(tasks)]),
    )


_OURS = "our choice"
# What streams of the paper have in common with its code, https://github.com/Yujun-Shi/BLIP, and what not.
_PAPER = (
    "the paper's code: {}; up to 200 epochs, ended and slowed down (rate / 3 after 5 epochs) by the loss on "
    "{} of the training data held out. Our choice: all training data, a constant rate, {} epochs"
)

_PERMUTED = Protocol(
    "permuted_mnist",
    "10 permutations of MNIST, one shared head, MLP 784-100-100-10, SGD 0.01, batch 10, 5 epochs a task",
    make_tasks=Permuted(flat),
    network=_shared_head(10, 784, 100, 100),
    optimizer=partial(SGD, lr=0.01),
    tasks=10,
    epochs=5,
    batch_size=10,
    source="as in the figures published for GPM, TRGP and CUBER",
)
_PERMUTED_HEADS = Protocol(
    "permuted_mnist_heads",
    "10 permutations of MNIST, a head each, MLP 784-1200, SGD 0.01, batch 64, 5 epochs a task",
    make_tasks=Permuted(standardised),
    network=_with_heads(partial(mlp, [784, 1200]), 1200, 10),
    optimizer=partial(SGD, lr=0.01),
    tasks=10,
    epochs=5,
    batch_size=64,
    source=_PAPER.format("network, SGD 0.01, batch 64", "a share", 5),
)
_FIVE_SETS = Protocol(
    "five_sets",
    "CIFAR-10, notMNIST, MNIST, SVHN and Fashion-MNIST in an order drawn from the seed, a head each, "
    "AlexNet of width x0.8, SGD 0.05, batch 32, 30 epochs a task",
    make_tasks=Chained(("cifar10", "notmnist", "mnist", "svhn", "fashion_mnist"), drawn=True),
    network=_with_heads(partial(alexnet, 0.8), 1638, 10),
    optimizer=partial(SGD, lr=0.05),
    tasks=5,
    epochs=30,
    batch_size=32,
    source=_PAPER.format("order, images, network, SGD 0.05, batch 32", "15 %", 30),
)
_MINI_IMAGENET = Protocol(
    "mini_imagenet_alexnet",
    "mini-ImageNet in 20 tasks of 5 classes drawn from the seed, a head each, AlexNet for 84x84, SGD 0.01, "
    "batch 32, 50 epochs a task",
    make_tasks=Split("mini_imagenet", coloured, classes_per_task=5, drawn=True),
    network=_with_heads(partial(alexnet, size=84, hidden=(2048, 512), dropout=0.5), 512, 5),
    optimizer=partial(SGD, lr=0.01),
    tasks=20,
    epochs=50,
    batch_size=32,
    source=_PAPER.format(
        "tasks drawn from the seed, 500 and 100 images a class, normalised as ImageNet, network, SGD 0.01, "
        "batch 32",
        "2 %",
        50,
    ),
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
            source=_OURS,
        ),
        replace(
            _PERMUTED,
            name="rotated_mnist",
            description="MNIST turned by 0, 20, ..., 180 degrees, one shared head, MLP 784-100-100-10, "
            "SGD 0.01, batch 10, 1 epoch a task",
            make_tasks=Rotated(step=20.0),
            network=lambda _tasks: (flattening_mlp([784, 100, 100]), nn.Linear(100, 10)),
            epochs=1,
            source=_OURS,
        ),
        Protocol(
            "split_mnist",
            "MNIST in 5 pairs of classes, a head each, MLP 784-1200, SGD 0.01, batch 64, 3 epochs a task",
            make_tasks=Split("mnist", standardised),
            network=_with_heads(partial(mlp, [784, 1200]), 1200, 2),
            optimizer=partial(SGD, lr=0.01),
            tasks=5,
            epochs=3,
            batch_size=64,
            source=_PAPER.format("network, SGD 0.01, batch 64", "a share", 3),
        ),
        Protocol(
            "split_mnist_domain",
            "MNIST in 5 pairs of classes, one shared head of two, MLP 1024-400-400-2, Adam 1e-3, batch 128, "
            "4 epochs a task",
            make_tasks=Split("mnist", padded),
            network=_shared_head(2, 1024, 400, 400),
            optimizer=partial(Adam, lr=1e-3),
            tasks=5,
            epochs=4,
            batch_size=128,
            source="Hsu et al., arXiv 1810.12488, incremental domain learning, as their code has it, "
            "https://github.com/GT-RIPL/Continual-Learning-Benchmark; there Adam keeps its averages from "
            "task to task",
        ),
        Protocol(
            "split_mnist_domain_drawn",
            "MNIST in 5 pairs of classes drawn from the seed, one shared head of two, MLP 784-400-400-2, "
            "Adam 1e-3, batch 128, 21 epochs a task",
            make_tasks=Split("mnist", flat, drawn=True),
            network=_shared_head(2, 784, 400, 400),
            optimizer=partial(Adam, lr=1e-3),
            tasks=5,
            epochs=21,
            batch_size=128,
            source="van de Ven and Tolias, arXiv 1904.07734, Domain-IL, as their code has it, "
            "https://github.com/GMvandeVen/continual-learning; there 2,000 steps a task, 21.3 epochs, and "
            "Adam keeps its averages from task to task",
        ),
        Protocol(
            "split_fashion",
            "Fashion-MNIST in 5 pairs of classes, one shared head of two, MLP 784-100-100-2, SGD 0.01, "
            "batch 10, 5 epochs a task",
            make_tasks=Split("fashion_mnist", flat),
            network=_shared_head(2, 784, 100, 100),
            optimizer=partial(SGD, lr=0.01),
            tasks=5,
            epochs=5,
            batch_size=10,
            source=_OURS,
        ),
        Protocol(
            "split_cifar10",
            "CIFAR-10 in 5 pairs of classes, a head each, AlexNet, SGD 0.05, batch 32, 10 epochs a task",
            make_tasks=Split("cifar10", coloured),
            network=_with_heads(alexnet, 2048, 2),
            optimizer=partial(SGD, lr=0.05),
            tasks=5,
            epochs=10,
            batch_size=32,
            source="the paper's AlexNet, images, rate and batch; our choice of tasks and epochs",
        ),
        replace(
            _FIVE_SETS,
            name="three_sets",
            description="MNIST, Fashion-MNIST and CIFAR-10, a head each, AlexNet of width x0.8, SGD 0.05, "
            "batch 32, 5 epochs a task",
            make_tasks=Chained(("mnist", "fashion_mnist", "cifar10")),
            tasks=3,
            epochs=5,
            source="three of the sets of five_sets, learned as there; our choice of order and epochs",
        ),
        Protocol(
            "alternating_cifar",
            "2 classes of CIFAR-10 and 20 of CIFAR-100 by turns, 10 tasks, a head each, AlexNet of width x2, "
            "SGD 0.05, batch 32, 50 epochs a task",
            make_tasks=AlternatingCifar(),
            network=_with_heads(partial(alexnet, 2, hidden=(2048, 2048)), 2048, 2, 20),
            optimizer=partial(SGD, lr=0.05),
            tasks=10,
            epochs=50,
            batch_size=32,
            source=_PAPER.format(
                "tasks, images, network (convolutions x2, hidden layers not), SGD 0.05, batch 32",
                "a share",
                50,
            )
            + ", strictly by turns, where the loader of UCB, which the code builds on, draws the order of "
            "the ten from the seed",
        ),
        _FIVE_SETS,
        _MINI_IMAGENET,
        replace(
            _MINI_IMAGENET,
            name="mini_imagenet_resnet",
            description="mini_imagenet_alexnet with a ResNet-18 of width x1.5",
            network=_with_heads(mini_imagenet_resnet18, 768, 5),
        ),
    )
}
