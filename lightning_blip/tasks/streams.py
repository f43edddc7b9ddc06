"""Streams of tasks made from data sets: split the classes, permute or rotate the inputs, chain data sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_blip.tasks.task import MappedDataset, Samples, Task, labels_of


def hold_out(task: Task, fraction: float, seed: int) -> Task:
    """Hold out a random share of a task's training set as its validation set.

    Args:
        task: The task.
        fraction: The share, above 0 and below 1.
        seed: The seed of the random choice.

    Returns:
        A new task with the same test set.

    Example:
        >>> from torch.utils.data import TensorDataset
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
    """Divide the classes of a data set among tasks, in the order of their labels.

    Args:
        train: A map-style data set of all classes.
        test: A data set of the same classes, for validation and test.
        classes_per_task: The number of classes per task.
        relabel: Whether labels start at 0 in every task, for one head per task, or one shared head of that
            width; otherwise the labels of the data are kept.

    Returns:
        The tasks.

    Raises:
        ValueError: If the number of classes is not a multiple of ``classes_per_task``.

    Example:
        >>> from torch.utils.data import TensorDataset
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
    """Make tasks from the same data, each with its input values in another fixed order.

    Args:
        train: A map-style data set.
        test: A data set for validation and test.
        tasks: The number of tasks; the first keeps the inputs as they are.
        seed: The seed of the permutations.

    Returns:
        The tasks; the inputs keep their shape.

    Raises:
        ValueError: If ``tasks`` is below 1.

    Example:
        >>> from torch.utils.data import TensorDataset
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
    """Make tasks from the same images, each with the images rotated by another angle.

    Args:
        train: A map-style data set of images (H, W) or (C, H, W).
        test: A data set for validation and test.
        degrees: One angle per task, counter-clockwise. Values are interpolated bilinearly, with zeros around
            the image.

    Returns:
        The tasks.

    Raises:
        ValueError: If there is no angle, or the inputs are not images.

    Example:
        >>> from torch.utils.data import TensorDataset
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
    """Make one task per data set.

    Args:
        datasets: ``(train, test)`` for each task.
        names: The names of the tasks; by default "data set 0", "data set 1", ….

    Returns:
        The tasks, with the labels of the data.

    Raises:
        ValueError: If the number of names differs from the number of data sets.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> digits = TensorDataset(torch.zeros(4, 8), torch.tensor([0, 1, 0, 1]))
        >>> chain([(digits, digits)], names=["digits"])
        [Task('digits', classes=[0, 1], train=4, val=4, test=4)]
    """
    if names is None:
        names = [f"data set {i}" for i in range(len(datasets))]
    if len(names) != len(datasets):
        raise ValueError(
            f"names={list(names)} has {len(names)} entries for {len(datasets)} data sets: give one name each"
        )
    return [
        _transformed(name, train, test, None) for name, (train, test) in zip(names, datasets, strict=True)
    ]


def _transformed(name: str, train: Samples, test: Samples, inputs: Callable[[Tensor], Tensor] | None) -> Task:
    return Task(
        name,
        train=MappedDataset(train, inputs=inputs),
        test=MappedDataset(test, inputs=inputs),
        classes=tuple(torch.unique(labels_of(train)).tolist()),
    )


# The maps are classes, not closures, so that they can be sent to worker processes.


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
        grid = _rotated_grid(self.degrees, *images.shape[-2:]).expand(len(images), -1, -1, -1)
        return F.grid_sample(images, grid, align_corners=False).view(inputs.shape)


# Computing the grid takes five times as long as sampling a batch of ten with it.
@lru_cache
def _rotated_grid(degrees: float, height: int, width: int) -> Tensor:
    """Return the coordinates from which a rotated image takes its values, (1, height, width, 2)."""
    angle = torch.deg2rad(torch.tensor(degrees))
    cos, sin = torch.cos(angle), torch.sin(angle)
    # affine_grid scales both sides to −1…1: without the ratio the rotation would distort images with H ≠ W.
    rotation = torch.stack(
        [
            torch.stack([cos, -sin * height / width, torch.zeros(())]),
            torch.stack([sin * width / height, cos, torch.zeros(())]),
        ]
    )
    return F.affine_grid(rotation[None], [1, 1, height, width], align_corners=False)
