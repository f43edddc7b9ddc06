"""Base classes that the Trainers of both packages, ``pytorch_lightning`` and ``lightning``, take."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytorch_lightning as pl
from lightning_utilities.core.overrides import is_overridden

if TYPE_CHECKING or find_spec("lightning") is None:
    Callback = pl.Callback
    LightningDataModule = pl.LightningDataModule
else:
    import lightning.pytorch as other

    class Callback(pl.Callback, other.Callback):
        """A callback for either Trainer."""

    class LightningDataModule(pl.LightningDataModule, other.LightningDataModule):
        """A data module for either Trainer."""


def is_a(instance: object, *names: str) -> bool:
    """Whether something is of one of Lightning's classes, of whichever of its packages.

    Args:
        instance: Such as a callback, or a strategy.
        names: Of the classes, those that it inherits from among them.

    Returns:
        Whether it is of one of them.

    Example:
        >>> is_a(Callback(), "EarlyStopping"), is_a(Callback(), "Callback", "EarlyStopping")
        (False, True)
    """
    return any(kind.__name__ in names for kind in type(instance).__mro__)


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """The list of a Trainer's callbacks, which knows its type."""
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]


def overrides(module: pl.LightningModule, name: str) -> bool:
    """Whether a module defines a method itself, of whichever package its ``LightningModule`` is.

    Example:
        >>> overrides(pl.LightningModule(), "forward")
        False
    """
    base = next(kind for kind in type(module).__mro__ if kind.__name__ == "LightningModule")
    return bool(is_overridden(name, module, base))
