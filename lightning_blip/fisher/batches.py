"""Batches of samples: taking them apart, moving them, slicing them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Some samples of the batch at ``index``: what the module takes, their labels and how many there are."""

    inputs: Any
    labels: Any
    size: int
    index: int

    def __getitem__(self, samples: slice) -> Batch:
        """Only these samples. A tensor whose first dimension is not the batch's is shared by all samples."""

        def of_samples(tensor: Tensor) -> Tensor:
            return tensor[samples] if self.is_per_sample(tensor) else tensor

        size = len(range(*samples.indices(self.size)))
        inputs, labels = map_tensors(of_samples, (self.inputs, self.labels))
        return Batch(inputs, labels, size, self.index)

    def is_per_sample(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` holds one entry for each sample."""
        return tensor.ndim > 0 and tensor.shape[0] == self.size


def read(
    batches: Iterable[Any], samples: int | None, device: torch.device, parts: int = 1
) -> Iterator[Batch]:
    """The batches on ``device``, in so many parts each, no more than ``samples`` samples in all."""
    left = samples
    for index, pair in enumerate(batches):
        batch = _open(pair, index, device)
        if left is not None:
            batch = batch[: min(left, batch.size)]
            left -= batch.size
        size = -(-batch.size // parts)
        for start in range(0, batch.size, max(1, size)):
            yield batch[start : start + size] if parts > 1 else batch
        # Asked before the next batch is fetched: loading one only to throw it away may be slow.
        if left == 0:
            return


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a module is called with: a mapping by keyword, a tuple or list by position, else one argument."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, (tuple, list)) else ((inputs,), {})


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """``value`` with ``function`` applied to each tensor in its tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [map_tensors(function, item) for item in value]
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in ``value``, in the order in which ``map_tensors`` meets them."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if not isinstance(value, (tuple, list)):
        return []
    return [tensor for item in value for tensor in tensors_of(item)]


def _open(pair: Any, index: int, device: torch.device) -> Batch:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ValueError(
            f"batches must yield pairs (inputs, targets), not {type(pair).__name__}: "
            "give (inputs, None) where there are no targets."
        )
    inputs, labels = map_tensors(lambda tensor: tensor.detach().to(device), pair)
    sized = [tensor for tensor in tensors_of(inputs) if tensor.ndim > 0]
    if not sized:
        raise ValueError("batches must yield inputs with at least one tensor of shape (batch, ...).")
    return Batch(inputs, labels, sized[0].shape[0], index)
