"""Batches of samples: read them, slice them, and visit the tensors in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Some samples of one of the user's batches.

    Attributes:
        inputs: The module's inputs.
        labels: The targets, or the labels that replace them.
        size: The number of samples.
        index: The position of the user's batch, counted from 0.
    """

    inputs: Any
    labels: Any
    size: int
    index: int

    def __getitem__(self, samples: slice) -> Batch:
        """Return a batch of these samples; tensors that all samples share stay whole."""

        def select(tensor: Tensor) -> Tensor:
            return tensor[samples] if self.is_per_sample(tensor) else tensor

        size = len(range(*samples.indices(self.size)))
        inputs, labels = map_tensors(select, (self.inputs, self.labels))
        return Batch(inputs, labels, size, self.index)

    def is_per_sample(self, tensor: Tensor) -> bool:
        """Return whether the first dimension of ``tensor`` is the batch."""
        return tensor.ndim > 0 and tensor.shape[0] == self.size


def read_batches(
    batches: Iterable[Any], samples: int | None, device: torch.device, parts: int = 1
) -> Iterator[Batch]:
    """Yield the user's batches on a device.

    Args:
        batches: Yields pairs ``(inputs, targets)``.
        samples: The largest number of samples to read in all; None for no limit.
        device: Where the tensors are moved to.
        parts: The number of parts that each batch is divided into.
    """
    left = samples
    for index, pair in enumerate(batches):
        batch = _to_batch(pair, index, device)
        if left is not None:
            batch = batch[: min(left, batch.size)]
            left -= batch.size
        size = -(-batch.size // parts)
        for start in range(0, batch.size, max(1, size)):
            yield batch[start : start + size] if parts > 1 else batch
        # Stop before the next batch is loaded, because loading may be slow.
        if left == 0:
            return


def call_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments with which a module is called on ``inputs``."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, (tuple, list)) else ((inputs,), {})


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Return ``value`` with ``function`` applied to each tensor in its tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [map_tensors(function, item) for item in value]
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in ``value``, in the order in which ``map_tensors`` visits them."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if not isinstance(value, (tuple, list)):
        return []
    return [tensor for item in value for tensor in tensors_in(item)]


def _to_batch(pair: Any, index: int, device: torch.device) -> Batch:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ValueError(
            f"batches must yield pairs (inputs, targets), not {type(pair).__name__}: "
            "give (inputs, None) where there are no targets"
        )
    inputs, labels = map_tensors(lambda tensor: tensor.detach().to(device), pair)
    batched = [tensor for tensor in tensors_in(inputs) if tensor.ndim > 0]
    if not batched:
        raise ValueError("batches must yield inputs with at least one tensor of shape (batch, ...)")
    return Batch(inputs, labels, batched[0].shape[0], index)
