"""Joint training: all tasks of a sequence at once, the ceiling that no method is expected to pass."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from lightning_blip.tasks.datamodule import TaskSequenceDataModule
from lightning_blip.tasks.heads import task_heads
from lightning_blip.tasks.task import MappedDataset
from lightning_blip.trainer.classes import Callback, LightningDataModule, callbacks_of

TaskBatch = tuple[int, Tensor]  # a task, and the indices of some of its samples


class JointTraining(LightningDataModule):
    """Feed all tasks of a sequence at once, instead of one after another.

    Each batch has samples of one task; in every epoch all batches of all tasks come in a new random order.
    The head of the batch's task is active in every ``TaskHeads``. Validation and test have one loader for
    each task, so that ``val_acc`` is logged as ``val_acc/dataloader_idx_0``, ``_1``, …

    The number of epochs is the Trainer's ``max_epochs``: give it the ``epochs_per_task`` of the sequence for
    a comparison in which every sample is seen as often. All tasks' data is needed at the same time, which is
    what continual learning does without. A fit resumes from checkpoints saved at the end of an epoch, in one
    process.

    Args:
        tasks: The sequence; its tasks, batch size and seed are used, and its own position stays.

    Raises:
        ValueError: In a fit, if it resumes in the middle of an epoch or there are several processes.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> from lightning_blip.baselines import JointTraining
        >>> digits = TensorDataset(torch.zeros(40, 8), torch.arange(40) % 10)
        >>> tasks = TaskSequenceDataModule.split_classes(digits, digits, classes_per_task=5, batch_size=5)
        >>> len(JointTraining(tasks).train_dataloader())
        8

    Source:
        The upper bound of, among others, van de Ven and Tolias, Three scenarios for continual learning, 2019
        ("joint training").
    """

    def __init__(self, tasks: TaskSequenceDataModule) -> None:
        super().__init__()
        self.tasks = copy(tasks)
        self.tasks.learned = len(tasks)  # so that it validates on all of them
        self._order = _MixedOrder(tasks)

    def setup(self, stage: str) -> None:
        """Add the callback that switches heads."""
        trainer = self.trainer
        assert trainer is not None
        if stage == "fit" and trainer.world_size > 1:
            raise ValueError(
                f"JointTraining works in one process, and the Trainer has {trainer.world_size}: "
                "give the Trainer devices=1, num_nodes=1"
            )
        callbacks = callbacks_of(trainer)
        callbacks[:] = [one for one in callbacks if not isinstance(one, _SwitchHeads)]
        callbacks.insert(0, _SwitchHeads(self._order))

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the batches of all tasks, in mixed order."""
        samples = _TaskSamples(self.tasks)
        return DataLoader(samples, sampler=self._order, batch_size=None, num_workers=self.tasks.num_workers)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Return one loader for each task."""
        return self.tasks.val_dataloader()

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Return one loader for each task."""
        return self.tasks.test_dataloader()

    predict_dataloader = test_dataloader

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the generator that draws the orders."""
        return {"generator": self._order.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the generator that draws the orders."""
        self._order.generator.set_state(state_dict["generator"])


class _MixedOrder(Sampler[TaskBatch]):
    """All batches of all tasks, in a new random order per epoch; ``tasks`` holds the task of each batch."""

    def __init__(self, sequence: TaskSequenceDataModule) -> None:
        self.tasks: list[int] = []
        self.generator = torch.Generator().manual_seed(sequence.seed)
        self._sizes = [len(MappedDataset(task.train)) for task in sequence.tasks]
        self._batch_size = sequence.batch_size

    def __len__(self) -> int:
        return sum(-(-size // self._batch_size) for size in self._sizes)

    def __iter__(self) -> Iterator[TaskBatch]:
        batches = [
            (task, indices)
            for task, size in enumerate(self._sizes)
            for indices in torch.randperm(size, generator=self.generator).split(self._batch_size)
        ]
        mixed = [batches[i] for i in torch.randperm(len(batches), generator=self.generator)]
        self.tasks = [task for task, _ in mixed]
        return iter(mixed)


class _TaskSamples(Dataset[Any]):
    """The training samples of all tasks, read batch by batch."""

    def __init__(self, sequence: TaskSequenceDataModule) -> None:
        self._samples = [MappedDataset(task.train) for task in sequence.tasks]

    def __getitem__(self, batch: TaskBatch) -> Any:
        task, indices = batch
        samples = self._samples[task]
        if samples.in_memory:
            return samples.batch(indices)
        return default_collate([samples[i] for i in indices.tolist()])


class _SwitchHeads(Callback):
    """Activate the head of each batch's task."""

    def __init__(self, order: _MixedOrder) -> None:
        self._order = order

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        progress = trainer.fit_loop.epoch_loop.batch_progress
        if progress.current.ready and not progress.is_last_batch:
            raise ValueError(
                "JointTraining draws a new order per epoch and cannot resume in the middle of one: give "
                "ckpt_path a checkpoint that was saved at the end of an epoch"
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        _activate(pl_module, self._order.tasks[batch_idx])

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        _activate(pl_module, dataloader_idx)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start


def _activate(module: pl.LightningModule, task: int) -> None:
    for heads in task_heads(module):
        heads.active = task
