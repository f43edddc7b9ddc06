"""A body that learns the first task only: nothing is forgotten, and little more can be learned."""

from __future__ import annotations

import pytorch_lightning as pl

from lightning_blip.baselines.base import Baseline, part_of
from lightning_blip.tasks.task import Task


class FrozenBody(Baseline):
    """Freeze the body of a network after the first task; everything outside it keeps learning.

    From the second task on the body is in evaluation mode, so that neither dropout nor the running statistics
    of normalisation layers change its features. With ``TaskHeads`` behind it nothing is forgotten. It keeps
    no state.

    Args:
        body: The name of the part of the module to freeze, such as ``"encoder"``.

    Raises:
        ValueError: In a fit, if the module has no such part, or there are several optimizers or processes.

    Example:
        >>> from lightning_blip import ForgettingCurves
        >>> from lightning_blip.baselines import FrozenBody
        >>> trainer = pl.Trainer(
        ...     callbacks=[FrozenBody(body="encoder"), ForgettingCurves("val_acc")],
        ...     logger=False,
        ...     enable_checkpointing=False,
        ... )

    Source:
        Called "feature extraction" in Li and Hoiem, Learning without Forgetting, ECCV 2016, section 2.
    """

    def __init__(self, body: str = "body") -> None:
        self.body = body

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that the module has the body."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            part_of(pl_module, self.body, "body")

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Freeze the body unless this is the first task."""
        if task.index:
            part_of(pl_module, self.body, "body").requires_grad_(False).eval()
