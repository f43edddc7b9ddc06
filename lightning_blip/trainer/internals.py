"""Lightning's private attributes, each behind one named function that says why it is needed."""

from __future__ import annotations

import pytorch_lightning as pl


def optimizer_steps(trainer: pl.Trainer) -> int:
    """Return the number of training steps so far, as loggers count them.

    ``trainer.global_step`` counts the steps of every optimizer: in manual optimization with two optimizers it
    is twice the step that Lightning itself logs at. ``_batches_that_stepped`` is that step (Lightning 1.6 and
    later).
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def is_accumulating(trainer: pl.Trainer) -> bool:
    """Return whether the current batch only adds to the gradients, without a step of the optimizer.

    No public attribute tells it while the batch is processed (``_should_accumulate``, Lightning 1.2 and
    later).
    """
    return trainer.fit_loop._should_accumulate()
