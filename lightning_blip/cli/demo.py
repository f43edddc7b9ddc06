"""The demo: the same network learns a sequence of tasks twice, without BLIP and with it."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from torchmetrics.functional.classification import multiclass_accuracy

from lightning_blip.blip import BLIP
from lightning_blip.frozen.network import BasisName
from lightning_blip.metrics import average_score, backward_transfer
from lightning_blip.results.curves import ForgettingCurves
from lightning_blip.results.figures import comparison
from lightning_blip.results.record import RunRecord
from lightning_blip.tasks.datamodule import TaskSequenceDataModule
from lightning_blip.tasks.heads import TaskHeads


class Digits(pl.LightningModule):
    """A small classifier of digits with one head per task.

    Args:
        tasks: The number of tasks.
        hidden: The width of the two hidden layers.
        learning_rate: The learning rate of SGD.
    """

    def __init__(self, tasks: int, hidden: int, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.network = nn.Sequential(
            nn.Linear(64, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            TaskHeads(hidden, classes=[10] * tasks),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, 10) of images (N, 64)."""
        logits: Tensor = self.network(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy."""
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the accuracy on the task of the loader."""
        x, y = batch
        self.log("val_acc", multiclass_accuracy(self(x), y, num_classes=10, average="micro"))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Return scikit-learn's 1,797 scanned digits as a training set and a test set.

    Returns:
        Two data sets of images (N, 64) in [0, 1] and labels (N,); the second has every fifth digit.
    """
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16.0, torch.tensor(labels)
    held_out = torch.arange(len(y)) % 5 == 0
    return TensorDataset(x[~held_out], y[~held_out]), TensorDataset(x[held_out], y[held_out])


def demo(
    tasks: int = 10,
    epochs: int = 20,
    hidden: int = 100,
    learning_rate: float = 0.3,
    batch_size: int = 32,
    basis: BasisName = "kronecker",
    seed: int = 0,
    output: Path = Path("demo_results"),
) -> None:
    """Learn permuted digits, one permutation after another, without BLIP and with it, and compare the two.

    Args:
        tasks: The number of permutations of the pixels, each of which is one task.
        epochs: The number of epochs per task.
        hidden: The width of the network's two hidden layers.
        learning_rate: The learning rate of plain SGD.
        batch_size: The number of samples per batch.
        basis: The basis in which BLIP freezes bits: ``"diagonal"`` or ``"kronecker"``.
        seed: The seed of the weights, the permutations and the order of the samples.
        output: The folder for tables and pictures.
    """
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    console = Console()
    methods = {"fine-tuning": None, "BLIP": BLIP(basis=basis)}
    records: dict[str, RunRecord] = {}
    for name, blip in methods.items():
        console.print(
            f"Learning {tasks} permutations of the digits, {epochs} epochs each, with [bold]{name}[/bold]"
        )
        pl.seed_everything(seed, verbose=False)
        stream = TaskSequenceDataModule.permute_inputs(
            *digits(), tasks=tasks, epochs_per_task=epochs, batch_size=batch_size, seed=seed
        )
        curves = ForgettingCurves("val_acc")
        trainer = pl.Trainer(
            accelerator="cpu",
            callbacks=[curves] if blip is None else [blip, curves],
            check_val_every_n_epoch=5,
            default_root_dir=output / name,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(Digits(tasks, hidden, learning_rate), datamodule=stream)
        records[name] = curves.record(trainer)
        console.print(_scores(name, curves.matrix))
    console.print(_summary(methods, records))
    picture = output / "demo.png"
    comparison(records).savefig(picture, dpi=100)
    console.print(f"Both methods in one picture: {picture}")
    for name in methods:
        console.print(f"Curves of {name}: {output / name / 'forgetting.png'}")


def _summary(methods: dict[str, BLIP | None], records: dict[str, RunRecord]) -> Table:
    summary = Table(title="After the last task")
    for column in ("method", "ACC %", "BWT %", "used capacity %"):
        summary.add_column(column, justify="left" if column == "method" else "right")
    for name, blip in methods.items():
        summary.add_row(
            name,
            f"{100 * float(average_score(records[name].matrix)):.1f}",
            f"{100 * float(backward_transfer(records[name].matrix)):+.1f}",
            "" if blip is None else f"{100 * blip.used_capacity:.1f}",
        )
    return summary


def _scores(name: str, matrix: Tensor) -> Table:
    table = Table(title=f"R of {name}: accuracy in % on each task (columns) after learning each task (rows)")
    table.add_column("after")
    for task in range(len(matrix)):
        table.add_column(str(task), justify="right")
    for learned, row in enumerate(matrix):
        cells = ["" if score.isnan() else f"{100 * score:.0f}" for score in row]
        table.add_row(str(learned), *cells)
    return table
