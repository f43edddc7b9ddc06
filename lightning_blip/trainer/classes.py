"""Base classes and checks that work with both packages, ``pytorch_lightning`` and ``lightning``."""

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
        """A callback for the Trainer of either package."""

    class LightningDataModule(pl.LightningDataModule, other.LightningDataModule):
        """A data module for the Trainer of either package."""


def is_a(instance: object, *names: str) -> bool:
    """Return whether an object is an instance of one of Lightning's classes, from either package.

    Args:
        instance: An object, such as a callback or a strategy.
        names: The names of the classes; base classes count, too.

    Returns:
        Whether the object is an instance of one of the classes.

    Example:
        >>> is_a(Callback(), "EarlyStopping"), is_a(Callback(), "Callback", "EarlyStopping")
        (False, True)
    """
    return any(kind.__name__ in names for kind in type(instance).__mro__)


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """Return the list of a Trainer's callbacks, with its type."""
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]


def overrides(module: pl.LightningModule, name: str) -> bool:
    """Return whether a module overrides a method of ``LightningModule``, from either package.

    Example:
        >>> overrides(pl.LightningModule(), "forward")
        False
    """
    base = next(kind for kind in type(module).__mro__ if kind.__name__ == "LightningModule")
    return bool(is_overridden(name, module, base))
