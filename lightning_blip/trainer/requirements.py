"""What BLIP requires of a Trainer and a module, checked before anything is trained."""

from __future__ import annotations

import pytorch_lightning as pl

from lightning_blip.trainer.classes import is_a, overrides


def check_strategy(trainer: pl.Trainer) -> None:
    """Raise an error for a strategy that may divide parameters among processes.

    Raises:
        ValueError: For every strategy but those of a single device and DDP.
    """
    if not is_a(trainer.strategy, "SingleDeviceStrategy", "DDPStrategy"):
        raise ValueError(
            f"strategy={type(trainer.strategy).__name__} may divide the parameters, whose bits are "
            "frozen value by value: use strategy='ddp', or devices=1"
        )


def check_forward(module: pl.LightningModule) -> None:
    """Raise an error for a module that BLIP cannot ask for a prediction.

    Raises:
        ValueError: If the module defines no ``forward``.
    """
    if not overrides(module, "forward"):
        raise ValueError(
            f"{type(module).__name__} has no forward: define forward(inputs), which training_step may "
            "call as well, so that BLIP can ask the network for its prediction"
        )
