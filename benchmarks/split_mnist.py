"""MNIST split in five tasks of two classes, five heads: BLIP as the paper has it, against its own code."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import pytorch_lightning as pl
import torch

from benchmarks import data
from benchmarks.networks import Classifier, mlp
from benchmarks.trainer import quiet_trainer
from lightning_blip import BLIP, ForgettingCurves, TaskHeads, TaskSequenceDataModule
from lightning_blip.metrics import average_score, backward_transfer
from lightning_blip.streams import Task

# The paper's own code on this stream with this network, optimizer, epochs and prior.
PAPERS_CODE = "paper's own code: ACC 98.94 %, BWT -0.02 %"


class Ledger(pl.Callback):
    """Notes what BLIP has frozen after each task."""

    def __init__(self, blip: BLIP) -> None:
        self.blip = blip
        self.rows: list[tuple[float, float]] = []

    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Notes the mean number of frozen bits a parameter, and the used capacity."""
        bits = torch.cat([part.flatten() for part in self.blip.bits().values()]).float()
        self.rows.append((float(bits.mean()), self.blip.used_capacity))


def run(folder: Path, seed: int, prior: float, epochs: int) -> tuple[float, float, Ledger]:
    """Learns the five tasks.

    Returns:
        ACC and BWT over the paper's T, in %, and what was frozen.
    """
    pl.seed_everything(seed, verbose=False)
    train, test = data.load(folder, "mnist", standardise=True)
    tasks = TaskSequenceDataModule.split_classes(
        train, test, classes_per_task=2, epochs_per_task=epochs, batch_size=64, seed=seed
    )
    module = Classifier(mlp(784, 1200), TaskHeads(1200, classes=[2] * 5), partial(torch.optim.SGD, lr=0.01))
    curves = ForgettingCurves("val_acc")
    blip = BLIP.paper(prior=prior)
    ledger = Ledger(blip)
    with tempfile.TemporaryDirectory() as folder_of_run:
        trainer = quiet_trainer([blip, ledger, curves], default_root_dir=folder_of_run)
        trainer.fit(module, datamodule=tasks)
    score = 100 * float(average_score(curves.matrix))
    transfer = 100 * float(backward_transfer(curves.matrix, over="all"))
    return score, transfer, ledger


def main() -> None:
    """Prints ACC, BWT, frozen bits and capacity of each seed, and their mean."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with mnist.npz")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prior", type=float, default=1e-15, help="as the paper counts it")
    parser.add_argument("--epochs", type=int, default=3, help="of each task")
    arguments = parser.parse_args()
    scores, transfers = [], []
    for seed in range(arguments.seeds):
        start = time.perf_counter()
        score, transfer, ledger = run(arguments.data, seed, arguments.prior, arguments.epochs)
        scores.append(score)
        transfers.append(transfer)
        print(f"seed {seed}: ACC {score:.2f} %, BWT {transfer:+.2f} %, {time.perf_counter() - start:.0f} s")
        for task, (bits, capacity) in enumerate(ledger.rows, start=1):
            print(f"  after task {task}: {bits:.2f} bits a parameter frozen, capacity used {capacity:.1%}")
    spread = statistics.pstdev if len(scores) == 1 else statistics.stdev
    print(
        f"BLIP.paper(prior={arguments.prior:g}), {len(scores)} seeds: "
        f"ACC {statistics.mean(scores):.2f} ± {spread(scores):.2f} %, "
        f"BWT {statistics.mean(transfers):+.2f} ± {spread(transfers):.2f} %"
    )
    print(PAPERS_CODE)


if __name__ == "__main__":
    main()
