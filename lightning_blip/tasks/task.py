"""A task, and the data sets that it is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

if TYPE_CHECKING:
    Samples = Dataset[Any]
else:
    # With type arguments, jsonargparse would create a bare Dataset for any class or function named in YAML.
    Samples = Dataset


@dataclass(frozen=True)
class Task:
    """One task of a sequence.

    Attributes:
        name: The task's name in logs, tables and figures.
        train: The training set, map-style, of ``(input, label)`` pairs.
        val: The validation set; by default the test set.
        test: The test set.
        classes: The classes of the task, as the data names them.
        index: The task's position in its sequence, from 0; set by the data module.
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
    """A data set whose inputs and labels are mapped when they are read; tensors are read in whole batches.

    Args:
        samples: A map-style data set of ``(input, label)`` pairs.
        indices: The indices of the samples to use, in order; all samples by default.
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
        """Return several samples as one batch, if they are held in memory.

        Args:
            indices: The indices of the samples, (n,).

        Returns:
            The inputs (n, …) and the labels (n,).
        """
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
    """Return the labels of a map-style data set, if possible without decoding its inputs.

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
