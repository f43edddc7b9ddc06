"""A Trainer that says nothing and leaves nothing behind."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytorch_lightning as pl


def quiet_trainer(callbacks: list[pl.Callback], **options: Any) -> pl.Trainer:
    """A Trainer without logs, checkpoints, progress bar and advice.

    Args:
        callbacks: Its callbacks.
        options: Of ``pl.Trainer``, before these; on the CPU by default.

    Returns:
        The Trainer.
    """
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(callbacks=callbacks, **{**defaults, **options})
