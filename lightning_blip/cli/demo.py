"""The demo: the same network learns a stream of digits twice, without BLIP and with it."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
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
from lightning_blip.tasks.datamodule import TaskSequenceDataModule
from lightning_blip.tasks.heads import TaskHeads


class Digits(pl.LightningModule):
    """A small classifier with a head for each task."""

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
        """Logits (N, 10) of images (N, 64)."""
        logits: Tensor = self.network(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Logs the accuracy on the loader's task."""
        x, y = batch
        self.log("val_acc", multiclass_accuracy(self(x), y, num_classes=10, average="micro"))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


def digits() -> tuple[TensorDataset, TensorDataset]:
    """scikit-learn's 1,797 scanned digits, every fifth for testing: images (N, 64) in [0, 1], labels (N,)."""
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
    """Learns permuted digits one permutation after another, without and with BLIP, and compares.

    Args:
        tasks: How many permutations of the pixels.
        epochs: How long each is trained.
        hidden: Width of the network's two hidden layers.
        learning_rate: Of plain SGD.
        batch_size: Samples a batch.
        basis: Of BLIP: ``"diagonal"`` or ``"kronecker"``.
        seed: Of weights, permutations and the order of samples.
        output: Where tables and pictures go.
    """
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    console = Console()
    methods = {"fine-tuning": None, "BLIP": BLIP(basis=basis)}
    results: dict[str, Tensor] = {}
    for name, blip in methods.items():
        console.print(
            f"Learning {tasks} permutations of the digits, {epochs} epochs each: [bold]{name}[/bold]"
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
        results[name] = curves.matrix
        console.print(_scores(name, curves.matrix))
    summary = Table(title="After the last task")
    for column in ("method", "ACC %", "BWT %", "capacity used %"):
        summary.add_column(column, justify="left" if column == "method" else "right")
    for name, blip in methods.items():
        summary.add_row(
            name,
            f"{100 * float(average_score(results[name])):.1f}",
            f"{100 * float(backward_transfer(results[name])):+.1f}",
            "" if blip is None else f"{100 * blip.used_capacity:.1f}",
        )
    console.print(summary)
    console.print(f"Both in one picture: {_draw(results, output / 'demo.png')}")
    for name in methods:
        console.print(f"Curves of {name}: {output / name / 'forgetting.png'}")


def _scores(name: str, matrix: Tensor) -> Table:
    table = Table(title=f"R of {name}: accuracy in % on each task (columns) after learning each (rows)")
    table.add_column("after")
    for task in range(len(matrix)):
        table.add_column(str(task), justify="right")
    for learned, row in enumerate(matrix):
        cells = ["" if score.isnan() else f"{100 * score:.0f}" for score in row]
        table.add_row(str(learned), *cells)
    return table


def _draw(results: dict[str, Tensor], path: Path) -> Path:
    """R of each method on the same scale, and the mean over the tasks learned so far."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    means, *maps = figure.subplots(1, 1 + len(results))
    for axes, (name, matrix) in zip(maps, results.items(), strict=True):
        image = axes.imshow(100 * matrix.numpy(), vmin=0, vmax=100, cmap="viridis")
        axes.set(title=f"{name}: accuracy on each task", xlabel="task", ylabel="after learning task")
        learned = range(1, 1 + len(matrix))
        means.plot(learned, 100 * matrix.nanmean(dim=1).numpy(), marker="o", label=name)
    figure.colorbar(image, ax=maps, label="accuracy in %")
    means.set(title="Mean accuracy over the tasks learned", xlabel="tasks learned", ylim=(0, 100))
    means.legend(loc="lower left")
    figure.savefig(path, dpi=100)
    return path
