"""The fit of five tasks that is killed: it uses every source of randomness and counts its moments."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from fsspec.implementations.local import LocalFileOpener
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from lightning_blip import BLIP, ForgettingCurves, TaskSequenceDataModule
from lightning_blip.results.record import RECORD
from lightning_blip.tasks.streams import split_classes
from tests.helpers.networks import QUIET, Net, blobs

TASKS = 5
EPOCHS = [2, 3, 2, 3, 2]

# Neighbours differ much, so that a few kills, drawn from the front, cover very different kinds.
KINDS = (
    "Fisher batch",
    "file half written",
    "step begins",
    "boundary's validation batch",
    "boundary is consolidated",
    "file renamed",
    "step is done",
    "task begins",
    "file removed",
    "boundary begins",
    "validation batch",
    "file opened",
    "task has begun",
    "fit ends",
    "file half copied",  # only between devices
)


@dataclass(frozen=True)
class Setup:
    """The options of a fit.

    Attributes:
        basis: BLIP's ``basis``.
        saves: When a checkpoint is written: at the end of each training "epoch", of each "validation", or of
            every second training "batch".
        heads: Whether each task has its own head.
        prior: BLIP's ``prior``.
        plateau: Whether the learning rate depends on the score, instead of on the epoch.
        noise: Whether dropout, and noise on the data, draw from the global generators.
        across: Whether temporary files are on another device than the checkpoints.
    """

    basis: str
    saves: str
    heads: bool
    prior: float | Literal["auto"]
    plateau: bool = False
    noise: bool = True
    across: bool = False

    def __str__(self) -> str:
        return f"{self.basis}, {'heads' if self.heads else 'one head'}, saves at {self.saves} end"


class Moments:
    """Counts the moments of a fit, and kills the process at one of them, as ``kill -9`` does."""

    def __init__(self, last: int | None) -> None:
        self.seen: list[tuple[str, str]] = []
        self.where = "before the first step"
        self.in_boundary = False
        self._last = last

    def __call__(self, kind: str) -> None:
        self.seen.append((kind, self.where))
        if len(self.seen) - 1 == self._last:
            os.kill(os.getpid(), signal.SIGKILL)


class Noisy(Dataset[Any]):
    """Samples with noise from the three generators that data sets use."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        x, y = self.samples[index]
        return x + 0.1 * (torch.randn(8) + np.random.randn() + random.gauss(0.0, 1.0)), y  # noqa: NPY002


class DroppingNet(Net):
    """A module with dropout and a schedule; counts the batches on which information is measured."""

    def __init__(self, setup: Setup, moments: Moments) -> None:
        super().__init__(TASKS if setup.heads else 0, norm=True)
        self.body.append(nn.Dropout(0.2 if setup.noise else 0.0))
        self.moments = moments
        self.plateau = setup.plateau

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        if not self.plateau:
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", patience=0, threshold=0.05)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_acc"}}

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.moments.in_boundary and self.trainer.training:
            self.moments("Fisher batch")
        return batch


class Begins(pl.Callback):
    """Counts the starts of steps, boundaries and tasks; it is the first callback."""

    def __init__(self, moments: Moments) -> None:
        self.moments = moments

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        tasks = trainer.datamodule
        self.moments.where = f"task {tasks.task.index} epoch {tasks.epoch} batch {batch_idx}"
        self.moments("step begins")

    def on_task_end(self, trainer: Any, pl_module: Any, task: Any) -> None:
        self.moments("boundary begins")
        self.moments.in_boundary = True

    def on_task_start(self, trainer: Any, pl_module: Any, task: Any) -> None:
        self.moments("task begins")

    def on_validation_batch_start(self, trainer: Any, *_: Any) -> None:
        self.moments("boundary's validation batch" if self.moments.in_boundary else "validation batch")


class Ends(pl.Callback):
    """Counts and records what is done; it is the last callback before that of the checkpoints."""

    def __init__(self, moments: Moments, record: Path) -> None:
        self.moments = moments
        self.crossed: list[int] = []
        self._record = record.open("a", buffering=1, encoding="utf-8")

    def write(self, line: str) -> None:
        self._record.write(line + "\n")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.write(f"starts with weights {digest(pl_module)}, boundaries {self.crossed} crossed")

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        rate, loss = trainer.optimizers[0].param_groups[0]["lr"], float(outputs["loss"])
        self.write(
            f"step {trainer.global_step}: {self.moments.where}, lr {rate:g}, loss {loss:.9g}, "
            f"weights {digest(pl_module)}"
        )
        self.moments("step is done")

    def on_task_end(self, trainer: Any, pl_module: Any, task: Any) -> None:
        self.crossed.append(task.index)
        self.write(f"boundary {task.index}: weights {digest(pl_module)}")
        self.moments("boundary is consolidated")

    def on_task_start(self, trainer: Any, pl_module: Any, task: Any) -> None:
        self.moments.in_boundary = False
        self.moments("task has begun")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.moments("fit ends")

    def state_dict(self) -> dict[str, Any]:
        return {"crossed": list(self.crossed)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.crossed = list(state_dict["crossed"])


class Curves(ForgettingCurves):
    """Curves without the figure, which takes longer than the fit."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        pass


def digest(module: nn.Module) -> str:
    """Return a short hash of a network's state."""
    values = b"".join(value.numpy().tobytes() for value in module.state_dict().values())
    return hashlib.sha256(values).hexdigest()[:8]


def clouds(samples: int, seed: int) -> TensorDataset:
    """Return ten overlapping clouds of points, so that scores are below 1 and can differ."""
    x, y = blobs(samples, classes=2 * TASKS, seed=seed).tensors
    return TensorDataset(x + 3.0 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)), y)


def stream(setup: Setup) -> TaskSequenceDataModule:
    """Return five tasks of two classes, with four batches each, of which the last is smaller."""
    noisy = Noisy if setup.noise else lambda samples: samples
    tasks = [
        replace(task, train=noisy(task.train), val=noisy(task.val))
        for task in split_classes(clouds(150, seed=0), clouds(100, seed=1), 2, relabel=True)
    ]
    return TaskSequenceDataModule(tasks, epochs_per_task=EPOCHS, batch_size=8)


def fit(setup: Setup, folder: Path, last: int | None) -> None:
    """Train, or resume, and save the results; ``last`` is the moment of the kill."""
    warnings.simplefilter("ignore")
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    moments = Moments(last)
    blip, curves = BLIP(prior=setup.prior, basis=setup.basis, samples=48), Curves()
    ends = Ends(moments, folder / "record.txt")
    checkpoint = ModelCheckpoint(
        folder / "checkpoints",
        save_last=True,
        every_n_train_steps=2 if setup.saves == "batch" else None,
        save_on_train_epoch_end=False if setup.saves == "validation" else None,
    )
    callbacks = [Begins(moments), blip, curves, ends, checkpoint]
    options = {**QUIET, "enable_checkpointing": True, "default_root_dir": folder}
    trainer = pl.Trainer(**options, callbacks=callbacks)
    module = DroppingNet(setup, moments)
    with _watched_files(moments, folder, setup.across):
        trainer.fit(module, datamodule=stream(setup), ckpt_path="last")
    result = {
        "weights": module.state_dict(),
        "bits": blip.bits(),
        "precision": blip.precision(),
        "R": {
            "matrix": curves.matrix,
            "record": torch.frombuffer(bytearray((folder / RECORD).read_bytes()), dtype=torch.uint8),
        },
        "crossed": ends.crossed,
        "moments": moments.seen,
    }
    torch.save(result, folder / "result.pt")


@contextmanager
def _watched_files(moments: Moments, folder: Path, across: bool) -> Iterator[None]:
    """Count file operations in the folders of checkpoints and of temporary files."""
    temporary = folder / "temporary"
    temporary.mkdir(exist_ok=True)
    # Lightning writes a checkpoint to a temporary file and then moves it.
    tempfile.tempdir = str(temporary)
    places = (str(temporary), str(folder / "checkpoints"))
    kinds = {"os.rename": "file renamed", "os.remove": "file removed"}
    watching = True

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if not watching or (event not in kinds and event != "open"):
            return
        if not str(arguments[0]).startswith(places):
            return
        if event in kinds:
            moments(kinds[event])
        elif arguments[2] & (os.O_WRONLY | os.O_RDWR):
            moments("file opened")

    def write(opener: Any, data: bytes) -> int:
        return _write_halves(opener.f, data, partial(moments, "file half written"))

    LocalFileOpener.write = write
    if across:
        _move_by_copying(moments)
    sys.addaudithook(audit)  # it cannot be removed
    yield
    watching = False


def _write_halves(file: Any, data: bytes, between: Callable[[], None]) -> int:
    half = len(data) // 2
    file.write(data[:half])
    file.flush()
    between()
    file.write(data[half:])
    return len(data)


def _move_by_copying(moments: Moments) -> None:
    """Make files move as between devices, where they cannot be renamed and are copied."""

    def rename(source: str, target: str) -> None:
        moments("file renamed")
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    def copyfile(source: str, target: str, *, follow_symlinks: bool = True) -> str:
        with open(target, "wb") as file:  # noqa: PTH123
            _write_halves(file, Path(source).read_bytes(), partial(moments, "file half copied"))
        return target

    os.rename, shutil.copyfile = rename, copyfile
