"""From data sets to tasks: split the classes, permute or rotate the inputs, chain data sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset, TensorDataset

if TYPE_CHECKING:
    Samples = Dataset[Any]
else:
    # With type arguments, jsonargparse would make a bare Dataset of any class or function that a YAML names.
    Samples = Dataset


@dataclass(frozen=True)
class Task:
    """One task of a sequence.

    Attributes:
        name: How the task is called in logs, tables and pictures.
        train: The training set, map-style, of ``(input, label)`` pairs.
        val: The validation set; the test set where none is given.
        test: The test set.
        classes: The classes that the task tells apart, as the data names them.
        index: The task's place in its sequence, from 0; set by the data module.
    """

    name: str
    train: Samples
    val: Samples | None = None
    test: Samples | None = None
    classes: tuple[int, ...] = ()
    index: int = 0

    def __post_init__(self) -> None:
        if self.val is None:
            object.__setattr__(self, "val", self.test)

    def __repr__(self) -> str:
        sizes = ", ".join(
            f"{part}={len(cast(Any, samples)):,}"
            for part, samples in (("train", self.train), ("val", self.val), ("test", self.test))
            if samples is not None
        )
        return f"Task({self.name!r}, classes={list(self.classes)}, {sizes})"


class MappedDataset(Dataset[Any]):
    """A data set with its inputs and labels mapped as they are read; tensors are read a batch at a time.

    Args:
        samples: A map-style data set of ``(input, label)`` pairs.
        indices: Which of its samples, in order; all of them by default.
        inputs: Maps a batch of inputs (N, …).
        labels: Maps a batch of labels (N,).

    Example:
        >>> samples = TensorDataset(torch.arange(4.0), torch.tensor([5, 6, 5, 6]))
        >>> MappedDataset(samples, indices=torch.tensor([1, 3]), labels=lambda y: y - 5)[0]
        (tensor(1.), tensor(1))
    """

    def __init__(
        self,
        samples: Samples,
        indices: Tensor | None = None,
        inputs: Callable[[Tensor], Tensor] | None = None,
        labels: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.samples = samples
        self.indices = indices
        self.inputs = inputs
        self.labels = labels

    def __len__(self) -> int:
        return len(cast(Any, self.samples)) if self.indices is None else len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if self.indices is not None:
            index = int(self.indices[index])
        x, y = self.samples[index][:2]
        if self.inputs is not None:
            x = self.inputs(torch.as_tensor(x)[None])[0]
        if self.labels is not None:
            y = self.labels(torch.as_tensor(y)[None])[0]
        return x, y

    @property
    def in_memory(self) -> bool:
        """Whether the samples are held as tensors, so that a whole batch can be read at once."""
        if isinstance(self.samples, MappedDataset):
            return self.samples.in_memory
        return isinstance(self.samples, TensorDataset)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The samples at ``indices`` (n,) as a batch of inputs (n, …) and labels (n,), if held in memory."""
        if self.indices is not None:
            indices = self.indices[indices]
        if isinstance(self.samples, MappedDataset):
            x, y = self.samples.batch(indices)
        else:
            x, y = (tensor[indices] for tensor in cast(TensorDataset, self.samples).tensors[:2])
        return (
            x if self.inputs is None else self.inputs(x),
            y if self.labels is None else self.labels(y),
        )


def labels_of(samples: Samples) -> Tensor:
    """The labels of a map-style data set, without decoding its inputs where it offers them.

    Args:
        samples: A data set with ``.targets``, a ``TensorDataset`` whose last tensor is the labels, a
            ``Subset`` of either, or any data set of ``(input, label)`` pairs, which is read through once.

    Returns:
        int64 labels (N,).

    Example:
        >>> labels_of(TensorDataset(torch.zeros(3, 2), torch.tensor([0, 1, 0])))
        tensor([0, 1, 0])
    """
    if isinstance(samples, TensorDataset):
        return samples.tensors[-1].to(torch.int64)
    if isinstance(samples, Subset):
        return labels_of(samples.dataset)[torch.as_tensor(samples.indices)]
    if isinstance(samples, MappedDataset):
        labels = labels_of(samples.samples)
        labels = labels if samples.indices is None else labels[samples.indices]
        return labels if samples.labels is None else samples.labels(labels)
    targets = getattr(samples, "targets", None)
    if targets is None:
        targets = [int(samples[i][1]) for i in range(len(cast(Any, samples)))]
    return torch.as_tensor(targets).to(torch.int64)


def _classes_of(samples: Samples) -> tuple[int, ...]:
    return tuple(torch.unique(labels_of(samples)).tolist())


def hold_out(task: Task, fraction: float, seed: int) -> Task:
    """The task with a random share of its training set held out as its validation set.

    Args:
        task: The task.
        fraction: The share, above 0 and below 1.
        seed: Of the choice.

    Returns:
        The task; its test set is as before.

    Example:
        >>> digits = TensorDataset(torch.zeros(10, 8), torch.arange(10))
        >>> hold_out(Task("digits", train=digits, test=digits), fraction=0.2, seed=0)
        Task('digits', classes=[], train=8, val=2, test=10)
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(cast(Any, task.train)), generator=generator)
    held = max(1, round(fraction * len(order)))
    return replace(
        task,
        train=MappedDataset(task.train, order[held:]),
        val=MappedDataset(task.train, order[:held]),
    )


def split_classes(
    train: Samples, test: Samples, classes_per_task: int = 2, relabel: bool = True
) -> list[Task]:
    """One task for every few classes, in the order of their labels.

    Args:
        train: Map-style data set of all classes.
        test: The same classes, for validation and test.
        classes_per_task: How many classes each task has.
        relabel: Whether labels run from 0 in every task, for heads per task or one shared head of that width;
            else they stay as they are.

    Returns:
        The tasks.

    Raises:
        ValueError: If the classes do not divide into tasks of that many.

    Example:
        >>> digits = TensorDataset(torch.zeros(40, 8), torch.arange(40) % 10)
        >>> [task.name for task in split_classes(digits, digits, classes_per_task=5)]
        ['0-1-2-3-4', '5-6-7-8-9']
    """
    labels = {"train": labels_of(train), "test": labels_of(test)}
    classes = torch.unique(labels["train"])
    if classes_per_task < 1 or len(classes) % classes_per_task:
        raise ValueError(
            f"classes_per_task={classes_per_task} does not divide the {len(classes)} classes of train: "
            f"choose a divisor of {len(classes)}, or leave classes out of the data set"
        )
    tasks = []
    for part in classes.split(classes_per_task):
        relabelled = _Relabel(part) if relabel else None
        parts = {
            name: MappedDataset(
                samples, torch.isin(labels[name], part).nonzero().flatten(), labels=relabelled
            )
            for name, samples in (("train", train), ("test", test))
        }
        name = "-".join(str(int(c)) for c in part)
        tasks.append(Task(name, train=parts["train"], test=parts["test"], classes=tuple(part.tolist())))
    return tasks


def permute_inputs(train: Samples, test: Samples, tasks: int = 10, seed: int = 0) -> list[Task]:
    """The same data again and again, each time with its input values in another fixed order.

    Args:
        train: Map-style data set.
        test: For validation and test.
        tasks: How many tasks; the first leaves the inputs as they are.
        seed: Of the permutations.

    Returns:
        The tasks; the inputs keep their shape.

    Raises:
        ValueError: If there is to be no task.

    Example:
        >>> digits = TensorDataset(torch.arange(8.0)[None], torch.tensor([0]))
        >>> [task.train[0][0].tolist()[:3] for task in permute_inputs(digits, digits, tasks=2)]
        [[0.0, 1.0, 2.0], [4.0, 0.0, 7.0]]
    """
    if tasks < 1:
        raise ValueError(f"tasks={tasks} must be at least 1")
    values = torch.as_tensor(train[0][0]).numel()
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.arange(values)] + [torch.randperm(values, generator=generator) for _ in range(tasks - 1)]
    return [
        _transformed(f"permutation {i}", train, test, _Permute(order) if i else None)
        for i, order in enumerate(orders)
    ]


def rotate(train: Samples, test: Samples, degrees: Sequence[float]) -> list[Task]:
    """The same images, turned by another angle in each task.

    Args:
        train: Map-style data set of images (H, W) or (C, H, W).
        test: For validation and test.
        degrees: One task an angle, counter-clockwise; bilinear, with zeros around the image.

    Returns:
        The tasks.

    Raises:
        ValueError: If there is no angle, or the inputs are not images.

    Example:
        >>> image = torch.zeros(1, 3, 3)
        >>> image[0, 0, 1] = 1.0
        >>> images = TensorDataset(image, torch.tensor([0]))
        >>> rotate(images, images, degrees=[0, 90])[1].train[0][0].round().abs()
        tensor([[0., 0., 0.],
                [1., 0., 0.],
                [0., 0., 0.]])
    """
    if not degrees:
        raise ValueError("degrees=[] gives no task: name at least one angle")
    dims = torch.as_tensor(train[0][0]).ndim
    if dims not in (2, 3):
        raise ValueError(f"train has inputs of {dims} dimensions: rotate takes images (H, W) or (C, H, W)")
    return [_transformed(f"{angle:g}°", train, test, _Rotate(angle)) for angle in degrees]


def chain(datasets: Sequence[tuple[Samples, Samples]], names: Sequence[str] | None = None) -> list[Task]:
    """One task a data set.

    Args:
        datasets: ``(train, test)`` of each task.
        names: Of the tasks; counted where none are given.

    Returns:
        The tasks, with the labels of the data.

    Raises:
        ValueError: If there are not as many names as data sets.

    Example:
        >>> digits = TensorDataset(torch.zeros(4, 8), torch.tensor([0, 1, 0, 1]))
        >>> chain([(digits, digits)], names=["digits"])
        [Task('digits', classes=[0, 1], train=4, val=4, test=4)]
    """
    if names is None:
        names = [f"data set {i}" for i in range(len(datasets))]
    if len(names) != len(datasets):
        raise ValueError(f"names={list(names)} has {len(names)} entries for {len(datasets)} data sets")
    return [
        _transformed(name, train, test, None) for name, (train, test) in zip(names, datasets, strict=True)
    ]


def _transformed(name: str, train: Samples, test: Samples, inputs: Callable[[Tensor], Tensor] | None) -> Task:
    return Task(
        name,
        train=MappedDataset(train, inputs=inputs),
        test=MappedDataset(test, inputs=inputs),
        classes=_classes_of(train),
    )


# The maps are classes, not closures, so that worker processes can be started with them.


@dataclass(frozen=True)
class _Relabel:
    classes: Tensor

    def __call__(self, labels: Tensor) -> Tensor:
        return torch.searchsorted(self.classes, labels.to(self.classes.dtype))


@dataclass(frozen=True)
class _Permute:
    order: Tensor

    def __call__(self, inputs: Tensor) -> Tensor:
        return inputs.flatten(1).index_select(1, self.order).view(inputs.shape)


@dataclass(frozen=True)
class _Rotate:
    degrees: float

    def __call__(self, inputs: Tensor) -> Tensor:
        images = inputs.view(len(inputs), -1, *inputs.shape[-2:]).float()
        grid = _turned_grid(self.degrees, *images.shape[-2:]).expand(len(images), -1, -1, -1)
        return F.grid_sample(images, grid, align_corners=False).view(inputs.shape)


# A batch of ten is sampled in a fifth of the time that it takes to make the grid.
@lru_cache
def _turned_grid(degrees: float, height: int, width: int) -> Tensor:
    """Where a turned image takes its values from, (1, height, width, 2)."""
    angle = torch.deg2rad(torch.tensor(degrees))
    cos, sin = torch.cos(angle), torch.sin(angle)
    # affine_grid works in coordinates from −1 to 1: the ratio keeps a turn a turn where H ≠ W.
    turn = torch.stack(
        [
            torch.stack([cos, -sin * height / width, torch.zeros(())]),
            torch.stack([sin * width / height, cos, torch.zeros(())]),
        ]
    )
    return F.affine_grid(turn[None], [1, 1, height, width], align_corners=False)
