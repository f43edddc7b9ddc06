"""Small streams and modules that tests train."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_blip import TaskHeads, TaskSequenceDataModule

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def blobs(samples: int = 120, classes: int = 6, inputs: int = 8, seed: int = 0) -> TensorDataset:
    """Return well separated clouds of points, one per class; labels are 0, 1, …, classes − 1, 0, 1, …."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, inputs, generator=torch.Generator().manual_seed(99)) * 2
    y = torch.arange(samples) % classes
    return TensorDataset(centres[y] + torch.randn(samples, inputs, generator=generator) * 0.5, y)


def pairs(**options: Any) -> TaskSequenceDataModule:
    """Return a sequence of three tasks with two classes each."""
    options = {"epochs_per_task": 2, "batch_size": 16, **options}
    return TaskSequenceDataModule.split_classes(blobs(), blobs(seed=1), classes_per_task=2, **options)


class Net(pl.LightningModule):
    """An ordinary module with ``heads`` heads, one per task, or with one shared head if ``heads`` is 0."""

    def __init__(self, heads: int = 0, norm: bool = False, optimizer: Any = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16) if norm else nn.Identity(), nn.ReLU())
        self.head = TaskHeads(16, classes=[2] * heads) if heads else nn.Linear(16, 6)
        self.make_optimizer = optimizer or partial(torch.optim.SGD, lr=0.1, momentum=0.9)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        x, y = batch
        self.log("val_acc", (self(x).argmax(1) == y).float().mean(), batch_size=len(y))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        x, y = batch
        self.log("test_acc", (self(x).argmax(1) == y).float().mean(), batch_size=len(y))

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())
