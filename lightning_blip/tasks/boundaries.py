"""The callback that ends tasks and starts them, and calls the hooks at every boundary."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from lightning_blip.tasks.heads import TaskHeads, task_heads
from lightning_blip.tasks.scores import add_plain_names
from lightning_blip.tasks.sequence import NamedTask, has_tasks, sequence
from lightning_blip.tasks.setup_checks import check_setup
from lightning_blip.tasks.stopping import TaskStopping
from lightning_blip.trainer import processes
from lightning_blip.trainer.classes import Callback, callbacks_of, is_a, overrides
from lightning_blip.trainer.internals import (
    discard_train_loader,
    discard_val_loaders,
    last_step_counted,
    reset_plateau,
    run_validation,
)
from lightning_blip.trainer.random_state import random_state, set_random_state

# The values that Lightning sets if the user gave the Trainer no max_epochs.
_UNSET_MAX_EPOCHS = (None, -1, 1000)
# Keys of a checkpoint.
_RANDOM = "random_states"
_LOGGED = "callback_metrics"
_ENDED = "epochs_ended"


class TaskBoundaries(Callback):
    """End tasks and start them, and call two hooks when it happens.

    ``on_task_start(trainer, pl_module, task)`` and ``on_task_end(trainer, pl_module, task)`` are called on
    every callback, and on the LightningModule, that defines them. At the end of a task's last epoch, in this
    order: ``on_task_end`` (BLIP consolidates here); the validation loop once more, so that the recorded score
    is that of the frozen network; the data module moves on; optimizers and schedulers are created again;
    ``on_task_start`` of the next task. Lightning saves its checkpoints after that: a crash loses no boundary
    and repeats none. ``on_task_start`` is also called when a fit starts or resumes within a task.

    The data module puts this callback first in the Trainer's list, so users need not add it. The callback
    also

    - activates the head of the current task in every :class:`TaskHeads`; in validation, test and prediction
      the head of the loader's task;
    - saves the states of the random number generators in checkpoints, so that a resumed fit draws the same
      numbers as an unbroken one;
    - makes the current task's ``val_acc`` available under this name to callbacks and schedulers that monitor
      it, and makes them start again with every task.

    Example:
        >>> class Announce(pl.Callback):
        ...     def on_task_start(self, trainer, pl_module, task):
        ...         print(f"now learning {task.name}")
    """

    def __init__(self) -> None:
        self._limit: int | None = None
        self._users_limit: int | None = None
        self._heads: list[TaskHeads] = []
        self._active_before: list[int] = []
        self._random: dict[str, Any] | None = None
        self._logged: dict[str, Tensor] = {}
        self._ended: int | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Set the number of epochs to that of the whole sequence, unless the user's number is smaller."""
        if stage != "fit":
            return
        tasks = sequence(trainer)
        check_setup(trainer, pl_module, tasks)
        if tasks.learned == len(tasks):
            rank_zero_warn(
                f"All {len(tasks)} tasks of the sequence are learned already: nothing is left to train. "
                "Make a new TaskSequenceDataModule to learn more."
            )
        users = trainer.fit_loop.max_epochs
        if users != self._limit:
            self._users_limit = None if users in _UNSET_MAX_EPOCHS else users
        self._limit_epochs(trainer)
        _show_one_task(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the number of epochs to that of all tasks again, now that the optimizers are created."""
        trainer.fit_loop.max_epochs = self._limit
        # A scheduler may have created the loader before a resumed fit restored the loader's state.
        discard_train_loader(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the current task, or resume within it."""
        tasks = sequence(trainer)
        # Tasks may have ended early: a resumed fit knows the epochs that are left only now.
        self._limit_epochs(trainer)
        if tasks.learned == len(tasks):
            return
        if tasks.optimizers_are_stale:
            self._set_up_optimizers(trainer)
            tasks.optimizers_are_stale = False
        self._start_task(trainer, pl_module)
        self._resume(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make plateau schedulers and checkpoints forget the best score of the previous task."""
        if sequence(trainer).epoch == 0:
            for config in trainer.lr_scheduler_configs:
                if isinstance(config.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                    reset_plateau(config.scheduler)
            for callback in callbacks_of(trainer):
                if is_a(callback, "ModelCheckpoint") and getattr(callback, "monitor", None):
                    _forget_best(callback)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the epoch and, if it was the task's last, cross the boundary."""
        tasks = sequence(trainer)
        stoppings = [callback for callback in callbacks_of(trainer) if isinstance(callback, TaskStopping)]
        stopped = [stopping.observe(trainer, pl_module, tasks.task) for stopping in stoppings]
        if not tasks.end_epoch() and not any(stopped):
            if trainer.fit_loop.restarting:
                _update_on_plateau(trainer)  # resumed from the validation of this epoch
            return
        for stopping in stoppings:
            stopping.restore(pl_module)
        _call_hook(trainer, pl_module, "on_task_end", tasks.task)
        tasks.close_task()
        _validate(trainer)
        if tasks.next_task():
            self._set_up_optimizers(trainer)
            self._start_task(trainer, pl_module)
        self._limit_epochs(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the heads to switch, if the loaders are those of the tasks."""
        self._heads = task_heads(pl_module) if has_tasks(trainer) else []
        self._active_before = [heads.active for heads in self._heads]

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Activate the head of the loader's task."""
        self._activate(dataloader_idx)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Activate the previous head again, and add the current task's scores under their plain names."""
        for heads, active in zip(self._heads, self._active_before, strict=True):
            heads.active = active
        if has_tasks(trainer):
            add_plain_names(trainer.callback_metrics, sequence(trainer).task.index)

    on_test_start = on_predict_start = on_validation_start
    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    on_test_end = on_predict_end = on_validation_end

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save what Lightning does not: the random states, the epochs that ended and the logged values."""
        checkpoint[_RANDOM] = processes.gathered(random_state())
        checkpoint[_ENDED] = _epochs_done(trainer)
        checkpoint[_LOGGED] = {name: float(value) for name, value in trainer.callback_metrics.items()}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep what was saved until training resumes."""
        if trainer.state.fn != "fit":
            return
        self._logged = {name: torch.tensor(value) for name, value in checkpoint.get(_LOGGED, {}).items()}
        self._ended = checkpoint.get(_ENDED)
        states, (rank, count) = checkpoint.get(_RANDOM, []), processes.rank_and_world_size()
        if len(states) == count:
            self._random = states[rank]
        if has_tasks(trainer):
            _show_one_task(trainer)

    def _resume(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the state in which the unbroken fit was when the checkpoint was saved."""
        trainer.callback_metrics.update(self._logged)
        self._logged = {}
        if trainer.fit_loop.resumed_on_epoch_end:
            _update_on_plateau(trainer)
        if self._random is not None:
            set_random_state(self._random)
            self._random = None
        ended, self._ended = self._ended, None
        if ended is not None and _epochs_done(trainer) > ended:
            self._end_saved_epoch(trainer, pl_module)

    def _end_saved_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the epoch after whose last batch the checkpoint was saved: Lightning skips its end.

        Values are logged at the epoch and step of the unbroken fit, which counts the last step only after the
        validation.
        """
        progress = trainer.fit_loop.epoch_progress.current
        progress.completed -= 1
        _validate(trainer)
        with last_step_counted(trainer):
            self.on_train_epoch_end(trainer, pl_module)
        progress.completed += 1
        discard_val_loaders(trainer)  # the next task may have started, with one loader more
        trainer.fit_loop.reset_restart_stage()  # the fit continues at the start of an epoch

    def _start_task(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        task = sequence(trainer).task
        pl_module.zero_grad()  # gradients of the previous task must not move weights in this one
        self._heads = task_heads(pl_module)
        self._activate(task.index)
        _call_hook(trainer, pl_module, "on_task_start", task)

    def _set_up_optimizers(self, trainer: pl.Trainer) -> None:
        _show_one_task(trainer)
        trainer.strategy.setup_optimizers(trainer)
        self._limit_epochs(trainer)

    def _activate(self, task: int) -> None:
        for heads in self._heads:
            heads.active = task

    def _limit_epochs(self, trainer: pl.Trainer) -> None:
        limit = _epochs_done(trainer) + sequence(trainer).remaining_epochs
        self._limit = limit if self._users_limit is None else min(limit, self._users_limit)
        trainer.fit_loop.max_epochs = self._limit


def add_boundaries(trainer: pl.Trainer) -> None:
    """Add a :class:`TaskBoundaries` to a Trainer, and reload the loaders every epoch.

    Args:
        trainer: The Trainer; a :class:`TaskBoundaries` that it already has stays.

    Example:
        >>> trainer = pl.Trainer(logger=False, enable_checkpointing=False)
        >>> add_boundaries(trainer)
        >>> type(trainer.callbacks[0]).__name__
        'TaskBoundaries'
    """
    callbacks = callbacks_of(trainer)
    if not any(isinstance(callback, TaskBoundaries) for callback in callbacks):
        callbacks.insert(0, TaskBoundaries())
    trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]


def _show_one_task(trainer: pl.Trainer) -> None:
    """Make ``trainer.estimated_stepping_batches`` that of the current task, for planned schedules."""
    tasks = sequence(trainer)
    trainer.fit_loop.max_epochs = tasks.epochs[tasks.task.index]
    discard_train_loader(trainer)  # tasks differ in their number of batches


def _forget_best(checkpoint: Any) -> None:
    """Make a ``ModelCheckpoint`` start its search for the best weights again; saved files stay on disk."""
    checkpoint.best_k_models = {}
    checkpoint.best_model_path = checkpoint.kth_best_model_path = ""
    checkpoint.best_model_score = None
    checkpoint.kth_value = torch.tensor(torch.inf if checkpoint.mode == "min" else -torch.inf)


def _epochs_done(trainer: pl.Trainer) -> int:
    return trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined, no-any-return]


def _update_on_plateau(trainer: pl.Trainer) -> None:
    """Update the plateau schedulers: Lightning does it after saving, and not again in a resumed fit."""
    trainer.fit_loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)


def _call_hook(trainer: pl.Trainer, pl_module: pl.LightningModule, name: str, task: NamedTask) -> None:
    for listener in (*callbacks_of(trainer), pl_module):
        hook = getattr(listener, name, None)
        if hook is not None:
            hook(trainer, pl_module, task)


def _validate(trainer: pl.Trainer) -> None:
    if trainer.enable_validation and overrides(trainer.lightning_module, "validation_step"):
        run_validation(trainer)
