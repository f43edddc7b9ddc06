"""A callback that breaks off a fit."""

import pytorch_lightning as pl


class Crash(pl.Callback):
    """Raises an error before the second batch of an epoch."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == self.epoch and batch_idx == 1:
            raise RuntimeError("crash")
