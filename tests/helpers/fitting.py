"""The fit that most tests run, and the comparison of saved states."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytorch_lightning as pl
import torch

from tests.helpers.networks import QUIET, Net, pairs


def fit(
    callbacks: Iterable[pl.Callback] | pl.Callback = (),
    module: pl.LightningModule | None = None,
    tasks: pl.LightningDataModule | None = None,
    ckpt_path: Any = None,
    **options: Any,
) -> pl.Trainer:
    """Train a module on a sequence of tasks without any output, and return the Trainer."""
    callbacks = [callbacks] if isinstance(callbacks, pl.Callback) else list(callbacks)
    trainer = pl.Trainer(**{**QUIET, "callbacks": callbacks, **options})
    trainer.fit(
        Net() if module is None else module,
        datamodule=pairs() if tasks is None else tasks,
        ckpt_path=ckpt_path,
    )
    return trainer


def same(a: Any, b: Any) -> bool:
    """Return whether two saved states are equal, tensor by tensor, with the same keys and lengths."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)
