"""The networks of the benchmarks, and the LightningModule that trains them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_accuracy


def mlp(inputs: int, *hidden: int) -> nn.Sequential:
    """Linear layers with ReLU, without a head."""
    layers: list[nn.Module] = []
    for before, after in zip((inputs, *hidden), hidden, strict=False):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers)


def alexnet() -> nn.Sequential:
    """The AlexNet of the paper's CIFAR experiments without a head: (3, 32, 32) to 2,048, 6.5 M parameters."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 4),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.MaxPool2d(2),
        nn.Conv2d(128, 256, 2),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(1024, 2048),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(2048, 2048),
        nn.ReLU(),
        nn.Dropout(0.5),
    )


class Classifier(pl.LightningModule):
    """An ordinary classifier: cross-entropy, accuracy in validation.

    Args:
        body: From inputs to features.
        head: From features to logits: a Linear layer, or heads per task.
        optimizer: Makes the optimizer from the parameters.
    """

    def __init__(
        self,
        body: nn.Module,
        head: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    ) -> None:
        super().__init__()
        self.body = body
        self.head = head
        self._make_optimizer = optimizer

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.head(self.body(x))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Logs the accuracy of the loader's task."""
        x, y = batch
        logits = self(x)
        accuracy = multiclass_accuracy(logits, y, num_classes=logits.shape[1], average="micro")
        self.log("val_acc", accuracy, batch_size=len(y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer asked for."""
        return self._make_optimizer(self.parameters())
