"""The ceiling: a network that learns all tasks of a stream at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from benchmarks.networks import Classifier
from benchmarks.scoring import accuracy
from benchmarks.trainer import quiet_trainer
from lightning_blip import TaskHeads, TaskSequenceDataModule
from lightning_blip.tasks.task import MappedDataset

TaskBatch = tuple[int, Tensor]  # a task, and the indices of some of its samples


def learn_jointly(
    module: Classifier,
    stream: TaskSequenceDataModule,
    epochs: int,
    batch_size: int,
    seed: int,
    callbacks: Sequence[pl.Callback] = (),
    **trainer_options: Any,
) -> Tensor:
    """Trains a network on all tasks at once: batches of one task each, the tasks in random order.

    Args:
        module: The network; with heads per task, that of the batch's task is active.
        stream: The tasks, their samples held in memory.
        epochs: How often every sample of every task is seen.
        batch_size: In training.
        seed: Of the order of the samples and of the batches.
        callbacks: Of the Trainer.
        trainer_options: Of ``pl.Trainer``.

    Returns:
        The accuracy on each task, (T,), 0 to 1.

    Source:
        The upper bound of, among others, van de Ven and Tolias, Three scenarios for continual learning, 2019
        ("joint training").
    """
    order = _MixedOrder(stream, batch_size, seed)
    loader = DataLoader(_TaskSamples(stream), sampler=order, batch_size=None)
    trainer = quiet_trainer([_SwitchHeads(order), *callbacks], max_epochs=epochs, **trainer_options)
    trainer.fit(module, loader)
    return torch.tensor([accuracy(module, task) for task in stream.tasks])


class _MixedOrder(Sampler[TaskBatch]):
    """All batches of all tasks in a new random order each time; ``tasks`` tells of which task each is."""

    def __init__(self, stream: TaskSequenceDataModule, batch_size: int, seed: int) -> None:
        self.tasks: list[int] = []
        self._sizes = [len(MappedDataset(task.train)) for task in stream.tasks]
        self._batch_size = batch_size
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return sum(-(-size // self._batch_size) for size in self._sizes)

    def __iter__(self) -> Iterator[TaskBatch]:
        batches = [
            (task, indices)
            for task, size in enumerate(self._sizes)
            for indices in torch.randperm(size, generator=self._generator).split(self._batch_size)
        ]
        mixed = [batches[i] for i in torch.randperm(len(batches), generator=self._generator)]
        self.tasks = [task for task, _ in mixed]
        return iter(mixed)


class _TaskSamples(Dataset[Any]):
    """Batches of the samples of any task."""

    def __init__(self, stream: TaskSequenceDataModule) -> None:
        self._samples = [MappedDataset(task.train) for task in stream.tasks]

    def __getitem__(self, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        task, indices = batch
        return self._samples[task].batch(indices)


class _SwitchHeads(pl.Callback):
    """Makes the head of each batch's task active."""

    def __init__(self, order: _MixedOrder) -> None:
        self._order = order

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        head = cast(Classifier, pl_module).head
        if isinstance(head, TaskHeads):
            head.active = self._order.tasks[batch_idx]
