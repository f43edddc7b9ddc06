"""A body that learns the first task only: nothing is forgotten, and little can be learned."""

from __future__ import annotations

from typing import cast

import pytorch_lightning as pl
from torch import nn

from lightning_blip import Task


class FrozenBody(pl.Callback):
    """Everything outside the head, ``pl_module.body``, stays as the first task left it; heads go on learning.

    The body is in evaluation mode from then on, so that dropout and the running statistics of norms do not
    change its features either. Nothing has to be saved: that a task is not the first one tells all.

    Source:
        Called "feature extraction" in Li and Hoiem, Learning without Forgetting, ECCV 2016, section 2.
    """

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Freezes the body, unless this is the first task."""
        if task.index:
            cast(nn.Module, pl_module.body).requires_grad_(False).eval()
