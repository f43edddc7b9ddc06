"""The batches on which a task's information is measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl

from lightning_blip.trainer.internals import batch_on_device

# A task with fewer samples is passed through several times, until labels were drawn for this many samples.
_LEAST_DRAWS = 1_000


@dataclass(frozen=True)
class TaskBatches:
    """Pairs ``(inputs, targets)``. A small task is passed through several times, with other labels drawn.

    Attributes:
        loader: Yields the pairs, or mappings whose ``"labels"`` are the targets.
        trainer: The Trainer that prepares batches as for its ``training_step``; None to use them unchanged.

    Example:
        >>> len(list(TaskBatches([("inputs", "targets")])))
        1
    """

    loader: Iterable[Any]
    trainer: pl.Trainer | None = None

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        # A generator, because a loader must not draw random numbers before its first batch is needed.
        for _ in range(self._passes):
            for batch in self.loader:
                if self.trainer is not None:
                    batch = batch_on_device(self.trainer, batch)
                yield inputs_and_targets(batch)

    @property
    def samples(self) -> int | None:
        """The number of samples over all passes, or None if it is unknown."""
        return None if self._size is None else self._size * self._passes

    @property
    def _size(self) -> int | None:
        dataset = getattr(self.loader, "dataset", None)
        return len(dataset) if isinstance(dataset, Sized) and len(dataset) else None

    @property
    def _passes(self) -> int:
        return math.ceil(_LEAST_DRAWS / (self._size or _LEAST_DRAWS))


def inputs_and_targets(batch: Any) -> tuple[Any, Any]:
    """Split a batch into the network's inputs and the targets.

    Args:
        batch: A pair, or a mapping with ``"labels"``.

    Returns:
        The inputs and the targets.

    Raises:
        ValueError: If the batch is neither a pair nor such a mapping.

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
        "'labels': make the data set return one of the two"
    )
