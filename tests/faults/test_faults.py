"""Faults of real runs: bad numbers, data that cannot be read, too little memory, a full disk."""

import errno
import math
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_blip import BLIP, ForgettingCurves, Task, TaskSequenceDataModule
from lightning_blip.results import figures
from tests.helpers.fitting import same
from tests.helpers.networks import QUIET, Net, blobs, pairs


class Flawed(Dataset):
    """Points that are flawed, or cannot be read, after the first ``good`` reads."""

    def __init__(self, good, flaw):
        self.points, self.left, self.flaw = blobs(40), good, flaw

    def __len__(self):
        return 40

    def __getitem__(self, index):
        self.left -= 1
        x, y = self.points[index]
        if self.left < 0:
            if isinstance(self.flaw, Exception):
                raise self.flaw
            x = torch.full_like(x, self.flaw)
        return x, y


class Moments(pl.Callback):
    """Keeps the weights and the frozen state after every step and boundary."""

    def __init__(self, blip):
        self.blip = blip

    def on_train_batch_end(self, trainer, pl_module, *arguments):
        self.weights = [theta.detach().clone() for theta in pl_module.parameters()]
        self.bits, self.learned = self.blip.bits(), self.blip.tasks_learned

    def on_task_end(self, trainer, pl_module, task):
        self.on_train_batch_end(trainer, pl_module)


def fit_flawed(good, flaw, error, message):
    """Learn two tasks, the second flawed, and assert that the error changed nothing that is frozen."""
    blip, module = BLIP(prior=1e-4, average=False), Net()
    moments = Moments(blip)
    tasks = TaskSequenceDataModule(
        [Task("clean", train=blobs(40)), Task("flawed", train=Flawed(good, flaw))], batch_size=8
    )
    with pytest.raises(error, match=message) as raised:
        pl.Trainer(**QUIET, callbacks=[blip, moments]).fit(module, datamodule=tasks)
    assert (blip.tasks_learned, moments.learned) == (1, 1)
    assert same(blip.bits(), moments.bits)
    return raised.value, module, moments


@pytest.mark.parametrize("flaw", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_fit_before_weights_move(flaw):
    _, module, moments = fit_flawed(
        24, flaw, FloatingPointError, r"Task 'flawed': the loss is nan, batch 3 of"
    )
    for theta, before in zip(module.parameters(), moments.weights, strict=True):
        assert torch.equal(theta, before)
    assert all(theta.isfinite().all() for theta in module.parameters())


def test_a_loader_that_fails_while_information_is_measured_changes_nothing():
    message = "Task 'flawed' was not consolidated, and what is frozen stays as it was: no such file"
    error, module, moments = fit_flawed(60, OSError("no such file"), RuntimeError, message)
    assert isinstance(error.__cause__, OSError)
    # Only the pull that was due at the boundary moved weights; no frozen bit changed.
    for theta, before in zip(module.parameters(), moments.weights, strict=True):
        torch.testing.assert_close(theta.detach(), before, rtol=0, atol=0.05)


class Greedy(nn.Module):
    """Runs out of memory for batches larger than ``most``."""

    def __init__(self, most):
        super().__init__()
        self.layer, self.most = nn.Linear(8, 6), most

    def forward(self, x):
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.layer(x)


def test_too_little_memory_is_answered_once_with_smaller_parts():
    loader = DataLoader(blobs(), batch_size=30)
    plain, small = Greedy(30), Greedy(8)
    small.load_state_dict(plain.state_dict())
    one, other = BLIP(prior=1e-4, pull=1.0, damping=0.1), BLIP(prior=1e-4, pull=1.0, damping=0.1)
    one.consolidate(plain, loader)
    with pytest.warns(
        UserWarning, match="Not enough memory to measure the information: trying again with 4 parts"
    ):
        other.consolidate(small, loader)
    assert same(one.bits(), other.bits())
    for name, precision in one.precision().items():
        torch.testing.assert_close(other.precision()[name], precision, rtol=2**-10, atol=0)
    with pytest.raises(torch.OutOfMemoryError), pytest.warns(UserWarning, match="Not enough memory"):
        BLIP().consolidate(Greedy(7), loader)


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    class Broken(nn.Linear):
        def forward(self, x):
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        BLIP().consolidate(Broken(8, 6), DataLoader(blobs(), batch_size=30))


def no_room(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def full_at(name, monkeypatch):
    """Make files of that name fail to open."""
    opened = Path.open

    def full(self, *arguments, **options):
        return no_room() if self.name == name else opened(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", full)


@pytest.mark.parametrize(
    ("what", "task"), [("forgetting.csv", "4-5"), ("forgetting.json.tmp", "0-1"), ("picture", "0-1")]
)
def test_a_full_disk_loses_the_report_but_not_the_fit(tmp_path, monkeypatch, what, task):
    blip, curves, module = BLIP(), ForgettingCurves(), Net()
    if what == "picture":  # the one for loggers
        monkeypatch.setattr(figures, "matrix_picture", no_room)
    else:
        full_at(what, monkeypatch)
    with pytest.warns(UserWarning, match=rf"curves up to task '{task}' could not be .* No space left"):
        pl.Trainer(
            **{**QUIET, "logger": TensorBoardLogger(tmp_path)},
            callbacks=[blip, curves],
            default_root_dir=tmp_path,
        ).fit(module, datamodule=pairs())
    assert blip.tasks_learned == 3
    assert curves.matrix.isfinite().sum() == 6
