"""Learn a small stream in one or more processes, and save the results of each process."""

import sys
from pathlib import Path

import pytorch_lightning as pl
import torch

from lightning_blip import BLIP, ForgettingCurves, TaskSequenceDataModule
from tests.helpers.networks import QUIET, Net, blobs

TASKS = 3


class Save(pl.Callback):
    """Saves this process's results at the end of the fit, and the samples that it trained on."""

    def __init__(self, folder: Path, blip: BLIP, curves: ForgettingCurves) -> None:
        self.folder, self.blip, self.curves = folder, blip, curves
        self.samples: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.samples.append(batch[0])

    def on_train_end(self, trainer, pl_module):
        torch.save(
            {
                "weights": dict(pl_module.state_dict()),
                "bits": self.blip.bits(),
                "precision": self.blip.precision(),
                "chosen": self.blip.chosen,
                "matrix": self.curves.matrix,
                "samples": torch.cat(self.samples),
            },
            self.folder / f"{trainer.world_size}-{trainer.global_rank}.pt",
        )


class Synced(Net):
    """A module that logs the mean over all processes."""

    def log(self, *arguments, **options):
        super().log(*arguments, **{**options, "sync_dist": True})


def learn(folder: Path, processes: int, heads: bool, norm: bool, **options) -> None:
    """Learn the stream, with the samples of each step divided among the processes."""
    pl.seed_everything(0, verbose=False)
    tasks = TaskSequenceDataModule.split_classes(
        blobs(192), blobs(192, seed=1), classes_per_task=2, epochs_per_task=3, batch_size=16 // processes
    )
    blip, curves = BLIP(samples=128, **options), ForgettingCurves()
    trainer = pl.Trainer(
        **{**QUIET, "callbacks": [blip, curves, Save(folder, blip, curves)]},
        devices=processes, default_root_dir=folder,
        strategy="ddp_find_unused_parameters_true" if processes > 1 else "auto",
    )  # fmt: skip
    trainer.fit(Synced(heads=TASKS if heads else 0, norm=norm), datamodule=tasks)


if __name__ == "__main__":
    _, folder, processes, basis, heads, norm, strengths = sys.argv
    torch.set_num_threads(1)
    given = {"pull": 3.0, "damping": 0.2} if strengths == "given" else {}
    learn(Path(folder), int(processes), heads == "heads", norm == "norm", basis=basis, **given)
