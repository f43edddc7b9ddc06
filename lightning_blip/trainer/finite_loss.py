"""A guard that stops a fit before a loss that is not finite moves the weights."""

from __future__ import annotations

import pytorch_lightning as pl
from torch import Tensor

from lightning_blip.trainer.internals import optimizer_steps


def check_finite(trainer: pl.Trainer, loss: Tensor, where: str = "") -> None:
    """Raise an error for a loss that is not finite.

    To read a loss waits for the device: other than on the CPU it is read as often as Lightning logs.

    Args:
        trainer: The Trainer.
        loss: The loss, before its backward pass.
        where: The beginning of the error message.

    Raises:
        FloatingPointError: If the loss is infinite or NaN.
    """
    if loss.device.type != "cpu" and optimizer_steps(trainer) % trainer.log_every_n_steps:  # type: ignore[attr-defined]
        return
    if not loss.isfinite().all():
        raise FloatingPointError(
            f"{where}the loss is {loss.item()}, batch {trainer.fit_loop.epoch_loop.batch_idx} of epoch "
            f"{trainer.current_epoch}: look for values in the data that are not finite, or take a smaller "
            "learning rate. The frozen bits and the weights are those before this batch"
        )
