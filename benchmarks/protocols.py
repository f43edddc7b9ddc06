"""The streams of images: their tasks, networks, optimizers and lengths."""

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
        name: The name of the stream.
        description: One line of text.
        make_tasks: See :class:`Stream`.
        network: Makes the body and the head of a network for a number of tasks.
        optimizer: Makes the optimizer from the parameters.
        tasks: The number of tasks.
        epochs: The number of epochs per task.
        batch_size: The batch size in training.
        source: The publication with these settings, and what was chosen here.
        metric: The score that the network logs in validation; a share, higher is better.
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
        """The number of epochs from one checkpoint to the next: those of a task."""
        return self.epochs

    @property
    def validate_every(self) -> int:
        """More epochs than the run has: it is validated at the boundaries only."""
        return self.tasks * self.epochs + 1

    @property
    def ceilings(self) -> None:
        """None: a score of 1 counts as 100 %."""

    def stream(self, folder: Path, seed: int) -> TaskSequenceDataModule:
        """Return the tasks as a data module.

        Args:
            folder: The folder of the data.
            seed: The seed of the tasks and of the order of their samples.

        Returns:
            The data module.

        Raises:
            FileNotFoundError: If the data is not there.
            ValueError: If the stream has fewer tasks.
        """
        return Stream(folder, self.make_tasks, self.tasks, self.epochs, self.batch_size, seed)

    def module(self) -> Classifier:
        """Return the network, its parameters drawn from torch's global random numbers."""
        # On two cores this makes convolutions a quarter faster.
        return Classifier(*self.network(self.tasks), self.optimizer).to(memory_format=torch.channels_last)

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process looks the functions up by the name of the stream.
        return _of_length, (self.name, self.tasks, self.epochs)


def _of_length(name: str, tasks: int, epochs: int) -> Protocol:
    return replace(PROTOCOLS[name], tasks=tasks, epochs=epochs)


def _shared_head(classes: int, *sizes: int) -> Callable[[int], Network]:
    return lambda _tasks: (mlp(sizes), nn.Linear(sizes[-1], classes))


def _with_heads(body: Callable[[], nn.Module], outputs: int, *classes: int) -> Callable[[int], Network]:
    """Return a function that makes a body and one head per task.

    Args:
        body: Makes the body.
        outputs: The number of its outputs.
        classes: The number of classes of each head; several numbers repeat in order.
    """
    return lambda tasks: (
        body(),
        TaskHeads(outputs, classes=[classes[i % len(classes)] for i in range(tasks)]),
    )


_OURS = "our choice"
# What the streams of the paper share with its code, https://github.com/Yujun-Shi/BLIP, and what differs.
_PAPER = (
    "the paper's code: {}; up to 200 epochs, ended early and with a learning rate that decays (/ 3 after 5 "
    "epochs) by the loss on {} of the training data held out. Our choice: all training data, a constant "
    "learning rate, {} epochs"
)

_PERMUTED = Protocol(
    "permuted_mnist",
    "10 permutations of MNIST, one shared head, MLP 784-100-100-10, SGD 0.01, batch 10, 5 epochs per task",
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
    "10 permutations of MNIST, a head per task, MLP 784-1200, SGD 0.01, batch 64, 5 epochs per task",
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
    "CIFAR-10, notMNIST, MNIST, SVHN and Fashion-MNIST in an order drawn from the seed, a head per task, "
    "AlexNet of width x0.8, SGD 0.05, batch 32, 30 epochs per task",
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
    "mini-ImageNet in 20 tasks of 5 classes drawn from the seed, a head per task, AlexNet for 84x84, "
    "SGD 0.01, batch 32, 50 epochs per task",
    make_tasks=Split("mini_imagenet", coloured, classes_per_task=5, drawn=True),
    network=_with_heads(partial(alexnet, size=84, hidden=(2048, 512), dropout=0.5), 512, 5),
    optimizer=partial(SGD, lr=0.01),
    tasks=20,
    epochs=50,
    batch_size=32,
    source=_PAPER.format(
        "tasks drawn from the seed, 500 and 100 images per class, normalised as ImageNet, network, SGD 0.01, "
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
            description="permuted_mnist_heads with Adam 1e-3 and 20 epochs per task",
            optimizer=partial(Adam, lr=1e-3),
            epochs=20,
            source=_OURS,
        ),
        replace(
            _PERMUTED,
            name="rotated_mnist",
            description="MNIST rotated by 0, 20, ..., 180 degrees, one shared head, MLP 784-100-100-10, "
            "SGD 0.01, batch 10, 1 epoch per task",
            make_tasks=Rotated(step=20.0),
            network=lambda _tasks: (flattening_mlp([784, 100, 100]), nn.Linear(100, 10)),
            epochs=1,
            source=_OURS,
        ),
        Protocol(
            "split_mnist",
            "MNIST in 5 pairs of classes, a head per task, MLP 784-1200, SGD 0.01, batch 64, "
            "3 epochs per task",
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
            "4 epochs per task",
            make_tasks=Split("mnist", padded),
            network=_shared_head(2, 1024, 400, 400),
            optimizer=partial(Adam, lr=1e-3),
            tasks=5,
            epochs=4,
            batch_size=128,
            source="Hsu et al., arXiv 1810.12488, incremental domain learning, as in their code, "
            "https://github.com/GT-RIPL/Continual-Learning-Benchmark; there Adam keeps its averages from "
            "task to task",
        ),
        Protocol(
            "split_mnist_domain_drawn",
            "MNIST in 5 pairs of classes drawn from the seed, one shared head of two, MLP 784-400-400-2, "
            "Adam 1e-3, batch 128, 21 epochs per task",
            make_tasks=Split("mnist", flat, drawn=True),
            network=_shared_head(2, 784, 400, 400),
            optimizer=partial(Adam, lr=1e-3),
            tasks=5,
            epochs=21,
            batch_size=128,
            source="van de Ven and Tolias, arXiv 1904.07734, Domain-IL, as in their code, "
            "https://github.com/GMvandeVen/continual-learning; there 2,000 steps per task, 21.3 epochs, and "
            "Adam keeps its averages from task to task",
        ),
        Protocol(
            "split_fashion",
            "Fashion-MNIST in 5 pairs of classes, one shared head of two, MLP 784-100-100-2, SGD 0.01, "
            "batch 10, 5 epochs per task",
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
            "CIFAR-10 in 5 pairs of classes, a head per task, AlexNet, SGD 0.05, batch 32, "
            "10 epochs per task",
            make_tasks=Split("cifar10", coloured),
            network=_with_heads(alexnet, 2048, 2),
            optimizer=partial(SGD, lr=0.05),
            tasks=5,
            epochs=10,
            batch_size=32,
            source="the paper's AlexNet, images, learning rate and batch; our choice of tasks and epochs",
        ),
        replace(
            _FIVE_SETS,
            name="three_sets",
            description="MNIST, Fashion-MNIST and CIFAR-10, a head per task, AlexNet of width x0.8, "
            "SGD 0.05, batch 32, 5 epochs per task",
            make_tasks=Chained(("mnist", "fashion_mnist", "cifar10")),
            tasks=3,
            epochs=5,
            source="three of the sets of five_sets, trained likewise; our choice of order and epochs",
        ),
        Protocol(
            "alternating_cifar",
            "2 classes of CIFAR-10 and 20 of CIFAR-100 alternating, 10 tasks, a head per task, "
            "AlexNet of width x2, SGD 0.05, batch 32, 50 epochs per task",
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
            + ", strictly alternating; the loader of UCB, on which the paper's code builds, draws the order "
            "of the ten tasks from the seed",
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
