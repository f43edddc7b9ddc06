"""A Trainer that says nothing and leaves nothing behind."""

from __future__ import annotations

import logging
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.profilers import PassThroughProfiler

_NOTHING = nullcontext()


class _NoProfiler(PassThroughProfiler):
    """Measures nothing, as Lightning's own, which makes a generator for it 80 times a step."""

    def profile(self, action_name: str) -> AbstractContextManager[None]:  # type: ignore[override]
        """A context that does nothing."""
        return _NOTHING


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
        "profiler": _NoProfiler(),
    }
    return pl.Trainer(callbacks=callbacks, **{**defaults, **options})
