"""Lightning's private attributes, each behind one named function that says why it is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch


def optimizer_steps(trainer: pl.Trainer) -> int:
    """Return the number of training steps so far, as loggers count them.

    ``trainer.global_step`` counts the steps of every optimizer: in manual optimization with two optimizers it
    is twice the step that Lightning itself logs at. ``_batches_that_stepped`` is that step (Lightning 1.6 and
    later).
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped


@contextmanager
def last_step_counted(trainer: pl.Trainer) -> Iterator[None]:
    """Count the step of an epoch's last batch already, for as long as the context lasts.

    Lightning counts it only after the validation that follows the batch (``_batches_that_stepped``, Lightning
    1.6 and later). A fit that is resumed from a checkpoint of that validation must log what follows at the
    step of the unbroken fit; afterwards Lightning itself counts the step.
    """
    loop = trainer.fit_loop.epoch_loop
    loop._batches_that_stepped += 1
    yield
    loop._batches_that_stepped -= 1


def is_accumulating(trainer: pl.Trainer) -> bool:
    """Return whether the current batch only adds to the gradients, without a step of the optimizer.

    No public attribute tells it while the batch is processed (``_should_accumulate``, Lightning 1.5 and
    later).
    """
    return trainer.fit_loop._should_accumulate()


def discard_train_loader(trainer: pl.Trainer) -> None:
    """Make the Trainer ask the data module for its training loader when it next needs one.

    Otherwise a Trainer keeps the loader, and the number of its batches, until an epoch begins
    (``_combined_loader``, Lightning 2.0 and later).
    """
    trainer.fit_loop._combined_loader = None


def discard_val_loaders(trainer: pl.Trainer) -> None:
    """Make the Trainer ask the data module for its validation loaders when it next validates.

    Otherwise a Trainer keeps the loaders until the next epoch (``_combined_loader``, Lightning 2.0 and
    later).
    """
    trainer.fit_loop.epoch_loop.val_loop._combined_loader = None


def run_validation(trainer: pl.Trainer) -> None:
    """Run the validation loop from within the training loop, as the training loop itself does.

    The validation loop overwrites a flag of the training loop that decides when logged values are reset, and
    the training loop restores it in the same way (``_first_loop_iter``, Lightning 2.1 and later).
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    connector = trainer._logger_connector
    first_iteration = connector._first_loop_iter
    loop.restarting = False  # a resumed fit would otherwise continue the validation that was saved
    trainer.validating = True
    loop.run()
    trainer.training = True
    connector._first_loop_iter = first_iteration


def batch_on_device(trainer: pl.Trainer, batch: Any) -> Any:
    """Return a batch as ``training_step`` gets it: after all hooks, in the right precision, on the device.

    The public hook ``on_before_batch_transfer`` of the module alone would leave out that of the data module
    (``_on_before_batch_transfer``, Lightning 1.8 and later).
    """
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def allows_unused_parameters(trainer: pl.Trainer) -> bool:
    """Return whether parameters may get no gradient in a step; plain DDP does not allow it.

    The strategy has no public attribute with the options of ``DistributedDataParallel`` (``_ddp_kwargs``,
    Lightning 1.6 and later; other strategies lack it).
    """
    options = getattr(trainer.strategy, "_ddp_kwargs", {"find_unused_parameters": True})
    return bool(options.get("find_unused_parameters"))


def metric_prefix(logger: Any) -> str:
    """Return what a logger puts before the name of every metric.

    A definition of a metric in Weights & Biases needs its full name, and the logger's prefix has no public
    attribute (``_prefix``, Lightning 1.1 and later).
    """
    return f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}" if logger._prefix else ""


def reset_plateau(scheduler: torch.optim.lr_scheduler.ReduceLROnPlateau) -> None:
    """Make a ``ReduceLROnPlateau`` forget its best value and the epochs without improvement.

    The scheduler has no public method for it (``_reset``, in every supported version of torch).
    """
    scheduler._reset()
