"""BLIP, the callback: after each task it freezes the bits that the task's information fixes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from lightning_blip.boundary import BoundaryReport, layer_of, metric_names
from lightning_blip.by_hand import ByHand
from lightning_blip.frozen.network import FanName
from lightning_blip.frozen.packing import LARGEST_MAX_BITS
from lightning_blip.memory import Memory
from lightning_blip.optim.optimizer import FrozenBitsOptimizer
from lightning_blip.settings import PAPER, Labels, Likelihood, Settings
from lightning_blip.tasks.sequence import has_tasks, position, sequence
from lightning_blip.tasks.stopping import TaskStopping
from lightning_blip.tasks.task import Task
from lightning_blip.trainer.classes import Callback, callbacks_of
from lightning_blip.trainer.finite_loss import check_finite
from lightning_blip.trainer.internals import is_accumulating, optimizer_steps
from lightning_blip.trainer.logging import define_axis, log_metrics
from lightning_blip.trainer.requirements import check_forward, check_strategy
from lightning_blip.trainer.task_batches import TaskBatches, inputs_and_targets

# A task ends with the mean of the weights that it had after this share of its training.
_AVERAGED_FROM = 0.8


class BLIP(Settings, ByHand, Callback):
    """Bit-Level Information Preserving: learns a sequence of tasks without forgetting the earlier ones.

    After each task it measures the information that the task's data gave each parameter, and freezes that
    many of its most significant bits. The free bits are pulled towards their values at the end of the task,
    in proportion to the information. Three settings are estimated from the first task; read them in
    :attr:`chosen`. All arguments are described in :class:`lightning_blip.settings.Settings`.

    No data is kept, and the memory does not grow with the number of tasks: 6 bytes per parameter, of which a
    checkpoint needs 3 (in the strict cell, under the exact rule; at most 6 otherwise); in the Kronecker basis
    4 bytes per parameter and 4·(in² + out²) per layer. Over the last fifth of a task the mean of the weights
    takes 4 bytes more. Running statistics may be kept per task, see ``norm_stats``.

    With a :class:`lightning_blip.TaskSequenceDataModule` everything happens by itself. With a loop of your
    own, call :meth:`consolidate` after each task; the same object, added to the next Trainer, goes on.

    While a task trains it logs ``blip/predicted_forgetting`` (see :meth:`predicted_forgetting`),
    ``blip/used_capacity`` (Σ bits / Σ N) and ``blip/at_wall_share`` as often as the Trainer does; at each
    boundary all metrics of :class:`lightning_blip.boundary.BoundaryReport`; and with them the position in the
    sequence, in tasks, as ``blip/position``.

    Raises:
        ValueError: If an argument is not allowed. At the start of a fit: if a pattern matches no parameter, a
            tracked parameter is in half precision, the module has no ``forward``, or the Trainer's strategy
            divides parameters.

    Example:
        >>> trainer = pl.Trainer(callbacks=[BLIP()], logger=False, enable_checkpointing=False)

    Source:
        Shi, Yuan, Chen, Feng: Continual Learning via Bit-Level Information Preserving, CVPR 2021.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        #: What the last boundary of this process measured and froze.
        self.last_boundary: BoundaryReport | None = None
        self._memory = Memory(self)
        self._optimizers: list[FrozenBitsOptimizer] = []  # those that the Trainer steps

    def __getstate__(self) -> dict[str, Any]:
        # A copy is not the one that the Trainer's optimizers ask.
        return {**vars(self), "_optimizers": []}

    @classmethod
    def paper(
        cls,
        prior: float = 1e-15,
        max_bits: int = LARGEST_MAX_BITS,
        samples: int = 8_000,
        likelihood: Likelihood = "categorical",
        labels: Labels = "sampled",
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        fan: FanName = "in",
        batch_size: int = 100,
    ) -> BLIP:
        """Return BLIP as in the paper, to the letter.

        The paper's settings are ``BLIP.paper(prior=1e-15)`` for MNIST and ``BLIP.paper(prior=5e-18,
        fan="max", batch_size=62)`` for Atari, where weights are initialised orthogonally and the information
        was measured on a rollout of 2,000 steps in 32 parts.

        Args:
            prior: F_prior on the scale of the paper's code, see ``batch_size``.
            max_bits: See :class:`lightning_blip.settings.Settings`, as for the other arguments.
            samples: The number of samples of the estimate.
            likelihood: The distribution that the network's output stands for.
            labels: Sampled or empirical.
            include: Patterns of parameters to track.
            exclude: Patterns of parameters to leave alone.
            fan: The size of a layer that bound and prior depend on.
            batch_size: The size of the batches over which the paper's code averages its loss before it
                squares the gradients: ``prior`` is converted to the scale of the true Fisher information,
                which is ``batch_size``² times as large. The paper's code has 100 in its experiments with
                images, 10 for mini-ImageNet and 62 for Atari. Your own batch size has no influence.

        Returns:
            The callback.

        Raises:
            ValueError: If an argument is not allowed.

        Example:
            >>> blip = BLIP.paper()
            >>> blip.rule, blip.cell, blip.scale, blip.pull
            ('paper', 'paper', 0.0, 0.0)
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1: that of the paper's code is 100")
        return cls(
            prior=prior * batch_size**2, max_bits=max_bits, samples=samples, likelihood=likelihood,
            labels=labels, include=include, exclude=exclude, fan=fan, **PAPER,
        )  # fmt: skip

    # The hooks of a fit, in the order in which they run

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Raise an error for a strategy that divides parameters, before it changes the module."""
        check_strategy(trainer)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Warn of a checkpoint that was saved without BLIP."""
        if trainer.state.fn == "fit" and self.state_key not in checkpoint.get("callbacks", {}):
            rank_zero_warn(
                "The checkpoint was saved without BLIP: the tasks learned so far are not protected. Call "
                "blip.consolidate(module, dataloader) with the data of earlier tasks, if you have them."
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the module, and give the metrics of BLIP their axis."""
        check_forward(pl_module)
        self._memory.attach(pl_module)
        if has_tasks(trainer):
            self._memory.first_task = self.tasks_learned - sequence(trainer).learned
            define_axis(
                trainer, "blip", metric_names(dict.fromkeys(map(layer_of, self._memory.network.states)))
            )
        elif not self.tasks_learned:
            datamodule = type(trainer.datamodule).__name__  # type: ignore[attr-defined]
            rank_zero_warn(
                f"datamodule={datamodule} has no tasks: nothing is consolidated by itself. Pass a "
                "TaskSequenceDataModule, or call blip.consolidate(trainer, dataloader) after the fit"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Protect the parameters, whether or not tasks come from a sequence."""
        self._protect(trainer, pl_module)

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Protect the parameters from the task's new optimizers."""
        self._protect(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Check early that information can be estimated from such batches."""
        if batch_idx == 0 and has_tasks(trainer):
            inputs_and_targets(batch)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Stop before a loss that is not finite moves the weights."""
        check_finite(trainer, loss, f"Task {sequence(trainer).task.name!r}: " if has_tasks(trainer) else "")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average the weights over the end of a task, and log the predicted forgetting."""
        if is_accumulating(trainer):
            return
        if self.average and has_tasks(trainer):
            done = sequence(trainer).share_done(batch_idx + 1, trainer.num_training_batches)
            if done > _AVERAGED_FROM and self._memory.network.just_pulled:
                self._memory.mean.add(pl_module)
        is_due = optimizer_steps(trainer) % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if self.tasks_learned and trainer.loggers and is_due:
            forgetting, at_walls = self._memory.network.strain(pl_module)
            metrics = {
                "blip/predicted_forgetting": forgetting,
                "blip/used_capacity": self.used_capacity,
                "blip/at_wall_share": at_walls / max(self._memory.network.values, 1),
            }
            if has_tasks(trainer):
                metrics["blip/position"] = position(trainer)
            log_metrics(trainer, metrics)

    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Consolidate the task."""
        if not any(isinstance(one, TaskStopping) and one.restore_best for one in callbacks_of(trainer)):
            self._memory.mean.put_in_place(pl_module)
        batches = TaskBatches(sequence(trainer).task_dataloader(), trainer)
        quiet = trainer.progress_bar_callback is None or not trainer.is_global_zero
        try:
            report = self._consolidate(pl_module, batches, quiet)
        except FloatingPointError as error:
            raise FloatingPointError(f"Task {task.name!r}: {error}") from error
        except Exception as error:
            raise RuntimeError(
                f"Task {task.name!r} was not consolidated, and what is frozen stays as it was: {error}"
            ) from error
        log_metrics(trainer, report.metrics() | {"blip/position": task.index + 1.0})

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Put the running statistics of the loader's task in place."""
        if has_tasks(trainer):
            self._memory.statistics.show(pl_module, self._memory.first_task + dataloader_idx)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the running statistics of the current task in place."""
        if has_tasks(trainer):
            self._memory.statistics.back(pl_module)

    on_validation_start = on_test_start = on_predict_start = on_validation_end
    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    on_test_end = on_predict_end = on_validation_end

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the optimizers when a fit has ended."""
        for optimizer in self._optimizers:
            optimizer.unwrap()
        self._optimizers = []

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return what was learned: it goes into every checkpoint."""
        return self._memory.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what was saved; after an error nothing is changed.

        Raises:
            ValueError: If it was learned with other settings, by a later version, or is damaged.
        """
        self._memory = Memory.restored(self, state_dict)

    def _protect(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wrap the Trainer's optimizers; a module may hand out the same one for each task."""
        current = trainer.strategy.optimizers
        for wrapper in self._optimizers:
            if all(wrapper is not optimizer for optimizer in current):
                wrapper.unwrap()
        self._optimizers = [
            one if isinstance(one, FrozenBitsOptimizer) else self.wrap(one, pl_module) for one in current
        ]
        trainer.strategy.optimizers = list(self._optimizers)
