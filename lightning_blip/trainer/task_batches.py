"""The batches of a task, as an estimate of its information takes them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl

from lightning_blip.trainer.internals import batch_on_device

# Labels are drawn for so many samples, or more, of however few there are.
_LEAST_DRAWS = 1_000


@dataclass(frozen=True)
class TaskBatches:
    """Pairs ``(inputs, targets)``, again and again if they are few: labels that are drawn differ each time.

    Attributes:
        loader: Yields the pairs, or mappings whose ``"labels"`` are the targets.
        trainer: Whose ``training_step`` gets them, prepared as for that; None to take them as they are.

    Example:
        >>> len(list(TaskBatches([("inputs", "targets")])))
        1
    """

    loader: Iterable[Any]
    trainer: pl.Trainer | None = None

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        # A loader draws no random number before the first batch is taken.
        for _ in range(self._passes):
            for batch in self.loader:
                if self.trainer is not None:
                    batch = batch_on_device(self.trainer, batch)
                yield inputs_and_targets(batch)

    @property
    def samples(self) -> int | None:
        """How many there are over all passes, where it can be known."""
        return None if self._size is None else self._size * self._passes

    @property
    def _size(self) -> int | None:
        dataset = getattr(self.loader, "dataset", None)
        return len(dataset) if isinstance(dataset, Sized) and len(dataset) else None

    @property
    def _passes(self) -> int:
        return math.ceil(_LEAST_DRAWS / (self._size or _LEAST_DRAWS))


def inputs_and_targets(batch: Any) -> tuple[Any, Any]:
    """Takes a batch apart.

    Args:
        batch: A pair, or a mapping with ``"labels"``.

    Returns:
        What the network takes, and the targets.

    Raises:
        ValueError: If it is neither.

    Example:
        >>> inputs_and_targets({"tokens": [1, 2], "labels": 0})
        ({'tokens': [1, 2]}, 0)
    """
    if isinstance(batch, Mapping) and "labels" in batch:
        return {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]
    if isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) == 2:
        return batch[0], batch[1]
    raise ValueError(
        f"batch of type {type(batch).__name__} is neither a pair (inputs, targets) nor a mapping with "
        "'labels': have the data set give one of the two"
    )
