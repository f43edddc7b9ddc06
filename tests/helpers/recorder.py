"""A callback that records the order of events in a fit."""

import pytorch_lightning as pl


class Recorder(pl.Callback):
    """Records task starts, task ends, epochs and validations, each with the index of the task."""

    def __init__(self):
        self.events = []

    def on_task_start(self, trainer, pl_module, task):
        self.events.append(("start", task.index))

    def on_task_end(self, trainer, pl_module, task):
        self.events.append(("end", task.index))

    def on_train_epoch_start(self, trainer, pl_module):
        self.events.append(("epoch", trainer.datamodule.task.index))

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.events.append(("validated", trainer.datamodule.task.index, len(trainer.val_dataloaders)))

    @property
    def ends(self):
        """The indices of the tasks that ended, in order."""
        return [event[1] for event in self.events if event[0] == "end"]

    @property
    def epochs(self):
        """The number of epochs that started."""
        return sum(event[0] == "epoch" for event in self.events)
