"""The one owner of where a task ends: it tells every callback and the module, and moves on."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from lightning_blip.tasks.heads import TaskHeads, task_heads
from lightning_blip.tasks.streams import Task
from lightning_blip.trainer import processes
from lightning_blip.trainer.classes import Callback, callbacks_of, is_a, overrides
from lightning_blip.trainer.internals import (
    allows_unused_parameters,
    discard_train_loader,
    discard_val_loaders,
    last_step_counted,
    reset_plateau,
    run_validation,
)
from lightning_blip.trainer.random_state import random_state, set_random_state

if TYPE_CHECKING:
    from lightning_blip.tasks.sequence import TaskSequence

# What Lightning puts where the user gave the Trainer no max_epochs.
_UNSET_MAX_EPOCHS = (None, -1, 1000)
# Entries of a checkpoint.
_RANDOM = "random_states"
_LOGGED = "callback_metrics"
_ENDED = "epochs_ended"


class TaskBoundaries(Callback):
    """Ends tasks and starts them, and tells everyone through two hooks.

    ``on_task_start(trainer, pl_module, task)`` and ``on_task_end(trainer, pl_module, task)`` are called on
    every callback, and on the LightningModule, that defines them. At the end of a task's last epoch, in this
    order: ``on_task_end`` (BLIP consolidates here); the validation loop once more, so that the recorded score
    is that of the frozen network; the data module moves on; optimizers and schedulers are rebuilt;
    ``on_task_start`` of the next task. Lightning saves its checkpoints after that: a crash loses no boundary
    and repeats none. ``on_task_start`` is also called when a fit begins or resumes within a task.

    The data module puts this callback first among the Trainer's: nothing is left to do by hand. It also makes
    the head of the task active in every :class:`TaskHeads`, in validation, test and prediction that of the
    loader's task; keeps the states of the random number generators in checkpoints, so that a resumed fit
    draws what the unbroken one would have; and lets callbacks and schedulers that monitor ``val_acc`` see
    that of the current task, by this name, every task anew.

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
        """Sets the number of epochs to that of the whole sequence, unless the user's is smaller."""
        if stage != "fit":
            return
        tasks = sequence(trainer)
        _check_callbacks(trainer)
        _check_strategy(trainer, pl_module)
        _check_validation_step(pl_module, tasks)
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
        """The optimizers are there: the fit has the epochs of all tasks again."""
        trainer.fit_loop.max_epochs = self._limit
        # A schedule may have had it made, before a resumed fit knows the state that it is to go on from.
        discard_train_loader(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts, or goes on with, the current task."""
        tasks = sequence(trainer)
        # Known only now where a fit is resumed: tasks may have ended early.
        self._limit_epochs(trainer)
        if tasks.learned == len(tasks):
            return
        if tasks.optimizers_are_stale:
            self._set_up_optimizers(trainer)
            tasks.optimizers_are_stale = False
        self._start_task(trainer, pl_module)
        self._go_on(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keeps what schedulers and checkpoints saw of the last task away from this one."""
        if sequence(trainer).epoch == 0:
            for config in trainer.lr_scheduler_configs:
                if isinstance(config.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                    reset_plateau(config.scheduler)
            for callback in callbacks_of(trainer):
                if is_a(callback, "ModelCheckpoint") and getattr(callback, "monitor", None):
                    _forget_best(callback)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Counts the epoch and, where it was the task's last, crosses the boundary."""
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
        """Finds the heads to switch, if the loaders are those of the tasks."""
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
        """Makes the head of the loader's task active."""
        self._activate(dataloader_idx)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Makes the head active that was, and what was logged of the current task known by its name."""
        for heads, active in zip(self._heads, self._active_before, strict=True):
            heads.active = active
        if has_tasks(trainer):
            _name_those_of(sequence(trainer).task.index, trainer.callback_metrics)

    on_test_start = on_predict_start = on_validation_start
    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    on_test_end = on_predict_end = on_validation_end

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keeps what Lightning does not: the states of the random number generators, and what was logged."""
        checkpoint[_RANDOM] = processes.gathered(random_state())
        checkpoint[_ENDED] = _epochs_done(trainer)
        checkpoint[_LOGGED] = {name: float(value) for name, value in trainer.callback_metrics.items()}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Goes back to them when training goes on."""
        if trainer.state.fn != "fit":
            return
        self._logged = {name: torch.tensor(value) for name, value in checkpoint.get(_LOGGED, {}).items()}
        self._ended = checkpoint.get(_ENDED)
        states, (rank, count) = checkpoint.get(_RANDOM, []), processes.rank_and_world_size()
        if len(states) == count:
            self._random = states[rank]
        if has_tasks(trainer):
            _show_one_task(trainer)

    def _go_on(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Does what a resumed fit lacks to be as the unbroken one was when the checkpoint was saved."""
        trainer.callback_metrics.update(self._logged)
        self._logged = {}
        if getattr(trainer.fit_loop, "resumed_on_epoch_end", False):
            _update_on_plateau(trainer)
        if self._random is not None:
            set_random_state(self._random)
            self._random = None
        ended, self._ended = self._ended, None
        if ended is not None and _epochs_done(trainer) > ended:
            # Saved after the last batch of an epoch, whose end Lightning then passes over. It is to be logged
            # at the epoch and steps of the unbroken fit, which count the last step only after the validation.
            progress = trainer.fit_loop.epoch_progress.current
            progress.completed -= 1
            _validate(trainer)
            with last_step_counted(trainer):
                self.on_train_epoch_end(trainer, pl_module)
            progress.completed += 1
            discard_val_loaders(trainer)  # they may be of one task more
            trainer.fit_loop.reset_restart_stage()  # what comes is the beginning of an epoch

    def _start_task(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        task = sequence(trainer).task
        pl_module.zero_grad()  # what the last task has left must not move anything in this one
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


class TaskStopping(Callback):
    """Ends a task early when a monitored value stops improving, and goes back to its best weights.

    Unlike Lightning's ``EarlyStopping`` it ends the task, not the fit, and every task begins with its whole
    patience. Epochs saved are saved: the later tasks are not trained longer.

    Args:
        monitor: A value that the module logs every epoch; in validation that of the current task is watched.
            (Of a value logged in training, a fit resumed from a checkpoint that was saved right after the
            validation does not know that epoch's: save at the end of the training epoch.)
        patience: How many epochs without improvement end a task: one number, or one a task.
        mode: ``"min"`` if lower is better, ``"max"`` if higher is.
        min_delta: The least change that counts as improvement, in the units of the value.
        restore_best: Whether a task ends with the weights of its best epoch instead of its last.

    Raises:
        ValueError: If ``patience`` or ``mode`` is off; in a fit, if ``monitor`` is never logged.

    Example:
        >>> stopping = TaskStopping("val_acc", patience=2, mode="max")
    """

    def __init__(
        self,
        monitor: str,
        patience: int | Sequence[int] = 3,
        mode: Literal["min", "max"] = "min",
        min_delta: float = 0.0,
        restore_best: bool = True,
    ) -> None:
        patiences = [patience] if isinstance(patience, int) else list(patience)
        if not patiences or min(patiences) < 0:
            raise ValueError(f"patience={patience} must be a number of epochs, or one a task, 0 or more")
        if mode not in ("min", "max"):
            raise ValueError(f"mode={mode!r} must be 'min' or 'max'")
        self.monitor = monitor
        self.patience = patience
        self.mode = mode
        self.min_delta = min_delta
        self.restore_best = restore_best
        self._best = float("inf")
        self._waited = 0
        self._weights: dict[str, Tensor] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Checks that each task has its patience."""
        if stage == "fit" and not isinstance(self.patience, int):
            tasks = len(sequence(trainer))
            if len(self.patience) != tasks:
                raise ValueError(
                    f"patience={self.patience} has {len(self.patience)} entries for {tasks} tasks"
                )

    def observe(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> bool:
        """Looks at the epoch that just ended.

        Returns:
            Whether the task should end here.
        """
        score = task_score(trainer.callback_metrics, self.monitor, task.index, alone=True)
        if self.mode == "max":
            score = -score
        if score < self._best - self.min_delta:
            self._best = score
            self._waited = 0
            if self.restore_best:
                self._weights = {
                    name: value.detach().cpu().clone() for name, value in pl_module.state_dict().items()
                }
        else:
            self._waited += 1
        patience = self.patience if isinstance(self.patience, int) else self.patience[task.index]
        return self._waited > 0 and self._waited >= patience

    def restore(self, pl_module: pl.LightningModule) -> None:
        """Gives the module the weights of the task's best epoch, and forgets the task."""
        if self._weights:
            pl_module.load_state_dict(self._weights)
        self._best, self._waited, self._weights = float("inf"), 0, {}

    def state_dict(self) -> dict[str, Any]:
        """What is remembered of the current task."""
        return {"best": self._best, "waited": self._waited, "weights": self._weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where a saved fit was."""
        self._best = state_dict["best"]
        self._waited = state_dict["waited"]
        self._weights = state_dict["weights"]


def task_score(metrics: Mapping[str, Tensor], name: str, task: int, alone: bool) -> float:
    """What was logged of one task: Lightning adds the loader's number where there are several.

    Args:
        metrics: The Trainer's ``callback_metrics``.
        name: As in ``self.log(name, …)``.
        task: The task's index, which is that of its validation loader.
        alone: Whether what was logged without a loader's number is of this task, too.

    Returns:
        The value.

    Raises:
        ValueError: If it was not logged.

    Example:
        >>> task_score({"val_acc/dataloader_idx_1": torch.tensor(0.5)}, "val_acc", task=1, alone=False)
        0.5
    """
    for key in (f"{name}/dataloader_idx_{task}", *([name] if alone else [])):
        if key in metrics:
            return float(metrics[key])
    raise ValueError(
        f"{name!r} was not logged for task {task}, only {sorted(metrics)}: "
        f"log it in the module's validation_step, self.log({name!r}, value)"
    )


def position(trainer: pl.Trainer) -> float:
    """Where in the sequence a fit is, in tasks: i + e/E after e of the E epochs of task i.

    Args:
        trainer: The Trainer.

    Returns:
        The position; epochs need not be whole.
    """
    tasks = sequence(trainer)
    batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    index: int = tasks.task.index
    return index + tasks.share_done(batches, trainer.num_training_batches)


def sequence(trainer: pl.Trainer) -> TaskSequence[Any]:
    """The sequence of tasks that a Trainer learns.

    Args:
        trainer: The Trainer.

    Returns:
        Its data module.

    Raises:
        ValueError: If that is no sequence of tasks.
    """
    if not has_tasks(trainer):
        datamodule = type(getattr(trainer, "datamodule", None)).__name__
        raise ValueError(
            f"datamodule={datamodule} has no tasks: pass trainer.fit(…, datamodule=TaskSequenceDataModule("
            '[Task("first", train_set, test_set), …])), with your own data sets'
        )
    return trainer.datamodule  # type: ignore[attr-defined, no-any-return]


def has_tasks(trainer: pl.Trainer) -> bool:
    """Whether what a Trainer works on is a sequence of tasks.

    Args:
        trainer: The Trainer.

    Returns:
        True if its data module is a :class:`TaskSequence`.
    """
    from lightning_blip.tasks.sequence import TaskSequence  # which brings this callback along

    return isinstance(getattr(trainer, "datamodule", None), TaskSequence)


def _show_one_task(trainer: pl.Trainer) -> None:
    """Has ``trainer.estimated_stepping_batches`` be that of the task, for schedulers that plan to its end."""
    tasks = sequence(trainer)
    trainer.fit_loop.max_epochs = tasks.epochs[tasks.task.index]
    discard_train_loader(trainer)  # the next task may have more batches than the last


def _check_callbacks(trainer: pl.Trainer) -> None:
    """Refuses what takes a sequence of tasks for a single one."""
    for callback in callbacks_of(trainer):
        name = type(callback).__name__
        if is_a(callback, "EarlyStopping"):
            arguments = {part: getattr(callback, part) for part in ("monitor", "patience", "mode")}
            given = ", ".join(f"{part}={value!r}" for part, value in arguments.items())
            raise ValueError(f"{name} would end the whole fit with a task: use TaskStopping({given}) instead")
        if is_a(callback, "StochasticWeightAveraging", "WeightAveraging"):
            raise ValueError(
                f"{name} would average weights of different tasks, and undo what is frozen: leave it out; "
                "BLIP averages the end of each task by itself (average=True, the default)"
            )


def _check_strategy(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    heads = any(len(one) > 1 for one in task_heads(pl_module))
    if heads and not allows_unused_parameters(trainer):
        raise ValueError(
            "TaskHeads leaves the heads of other tasks unused, which plain DDP does not allow: "
            "use strategy='ddp_find_unused_parameters_true'"
        )


def _forget_best(checkpoint: Any) -> None:
    """Has a ``ModelCheckpoint`` look for the best weights anew; those it has saved stay on disk."""
    checkpoint.best_k_models = {}
    checkpoint.best_model_path = checkpoint.kth_best_model_path = ""
    checkpoint.best_model_score = None
    checkpoint.kth_value = torch.tensor(torch.inf if checkpoint.mode == "min" else -torch.inf)


def _name_those_of(task: int, metrics: dict[str, Tensor]) -> None:
    suffix = f"/dataloader_idx_{task}"
    metrics |= {name.removesuffix(suffix): value for name, value in metrics.items() if name.endswith(suffix)}


def _check_validation_step(pl_module: pl.LightningModule, tasks: TaskSequence[Any]) -> None:
    validates = len(tasks) > 1 and tasks.validates and overrides(pl_module, "validation_step")
    if validates and "dataloader_idx" not in inspect.signature(pl_module.validation_step).parameters:
        raise ValueError(
            f"{type(pl_module).__name__}.validation_step will be run on each of {len(tasks)} tasks: give it "
            "the argument dataloader_idx=0"
        )


def _epochs_done(trainer: pl.Trainer) -> int:
    return trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined, no-any-return]


def _update_on_plateau(trainer: pl.Trainer) -> None:
    """Lightning updates these schedulers after it has saved, and a resumed fit does not make up for it."""
    trainer.fit_loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)


def _call_hook(trainer: pl.Trainer, pl_module: pl.LightningModule, name: str, task: Task) -> None:
    for listener in (*callbacks_of(trainer), pl_module):
        hook = getattr(listener, name, None)
        if hook is not None:
            hook(trainer, pl_module, task)


def _validate(trainer: pl.Trainer) -> None:
    """Runs the validation loop from within the training loop, as the training loop itself does."""
    if trainer.enable_validation and overrides(trainer.lightning_module, "validation_step"):
        run_validation(trainer)
