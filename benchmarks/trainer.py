"""A Trainer without output."""

from __future__ import annotations

import logging
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.profilers import PassThroughProfiler

_NOTHING = nullcontext()


class _NoProfiler(PassThroughProfiler):
    """A profiler that measures nothing; Lightning's own creates a generator 80 times per step."""

    def profile(self, action_name: str) -> AbstractContextManager[None]:  # type: ignore[override]
        """Return a context that does nothing."""
        return _NOTHING


def quiet_trainer(callbacks: list[pl.Callback], **options: Any) -> pl.Trainer:
    """Return a Trainer without logs, checkpoints, progress bar and advice.

    Args:
        callbacks: The callbacks of the Trainer.
        options: Arguments of ``pl.Trainer``, which override these defaults; the default accelerator is the
            CPU.

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
