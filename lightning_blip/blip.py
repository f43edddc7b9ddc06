"""BLIP: after each task it freezes the bits that the task's information fixes, and keeps them frozen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args
from weakref import WeakSet

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from pytorch_lightning.utilities.memory import garbage_collection_cuda, is_oom_error
from rich.progress import Progress
from torch import Tensor, nn

from lightning_blip.boundary import BoundaryReport, LayerReport, counts_by_layer, layer_of, metric_names
from lightning_blip.fisher import diagonal_fisher
from lightning_blip.fisher.factors import FactorObserver, Factors
from lightning_blip.fisher.overlap import OverlapObserver
from lightning_blip.frozen.diagonal import LARGEST_MAX_BITS, Cell
from lightning_blip.frozen.information import Rule
from lightning_blip.frozen.network import Basis, Fan, FrozenNetwork, damped
from lightning_blip.frozen.saved import check_number
from lightning_blip.optim.averaging import MeanWeights
from lightning_blip.optim.optimizer import FrozenBitsOptimizer, check_every, check_strengths
from lightning_blip.strengths import (
    KRONECKER_DAMPING,
    KRONECKER_PULL,
    choose_damping,
    choose_prior,
    choose_pull,
)
from lightning_blip.tasks.boundaries import TaskStopping, has_tasks, position, sequence
from lightning_blip.tasks.heads import task_heads
from lightning_blip.tasks.norm_stats import NormStats, TaskStatistics, freeze, thaw
from lightning_blip.tasks.streams import Task
from lightning_blip.trainer import processes
from lightning_blip.trainer.classes import Callback, callbacks_of, is_a, overrides
from lightning_blip.trainer.internals import is_accumulating, optimizer_steps
from lightning_blip.trainer.logging import define_axis, log_metrics
from lightning_blip.trainer.task_batches import TaskBatches, inputs_and_targets

Likelihood = str | Callable[[Any], torch.distributions.Distribution]
Labels = Literal["sampled", "empirical"]
Auto = Literal["auto"]

#: Of what :meth:`BLIP.state_dict` gives.
VERSION = 1
# Into so many parts each batch is divided where there is too little memory.
_PARTS = 4
# The weights that a task ends with are the mean of those that it had after this share of its training.
_AVERAGED_FROM = 0.8


class BLIP(Callback):
    """Bit-Level Information Preserving: learns tasks one after another without forgetting the earlier ones.

    After each task it estimates the information that the task's data gave every parameter, and freezes that
    many of the parameter's leading bits; what is left free is pulled towards where the task left it, in
    proportion to its information. Nothing has to be chosen: what a sensible setting depends on is measured
    on the first task, and can be read from :attr:`chosen`.

    No data is kept, and the memory does not grow with the number of tasks: 6 bytes a parameter, of which a
    checkpoint needs 3 (in the strict cell, under the exact rule; at most 6 otherwise); in the Kronecker basis
    4 bytes a parameter and 4·(in² + out²) a layer. Over the last fifth of a task the mean of the weights
    takes 4 bytes more, and in the midst of a step scaled updates of optimizers other than SGD do. (Running
    statistics may be kept of each task, see ``norm_stats``: a few numbers a channel.)

    With a :class:`TaskSequenceDataModule` all is done by itself. With a loop of one's own, call
    :meth:`consolidate` after each task; the same object, added to the next Trainer, goes on.

    It tracks every trainable parameter but those inside :class:`TaskHeads`. While a task trains it logs, as
    often as the Trainer does and to every logger, ``blip/predicted_forgetting`` (see
    :meth:`predicted_forgetting`), ``blip/used_capacity`` (Σ bits / Σ N) and ``blip/at_wall_share`` (of the
    parameters, those that the task pushes against their frozen bits). At each boundary it logs besides
    ``blip/information_gain`` (bits, summed, and for each layer), ``blip/used_capacity`` of each layer,
    ``blip/newly_frozen_share`` (those with more frozen bits than before the task), ``blip/drifted_share``
    (those whose frozen bits changed all the same: none in the strict cell), ``blip/seconds``, and what was
    chosen. ``blip/position`` says where in the sequence that was, in tasks.

    Args:
        prior: F_0, the information per input of a layer (see ``fan``) and sample that counts as none. A
            larger one freezes less. By default chosen at the first boundary, see
            :func:`lightning_blip.strengths.choose_prior`.
        max_bits: N, the most bits of a parameter that can be frozen, 1 to 20.
        rule: ``"exact"``: the posterior precision S_t = S_{t−1} + F_t tells the bits, and the free bits keep
            their values. ``"paper"``: the running mean of the Fisher does, and parameters are rounded to
            their frozen bits.
        cell: ``"strict"``: frozen bits never change. ``"paper"``: a parameter stays within ±B·2^−bits of
            where it was at the last boundary.
        basis: ``"diagonal"``: information is measured parameter by parameter. ``"kronecker"``: that of linear
            maps and convolutions in the eigenbasis of their Kronecker-factored Fisher information, where it
            is much closer to diagonal; it remembers more and takes more memory. See
            :class:`lightning_blip.frozen.kronecker.KroneckerBits`.
        scale: p: steps are multiplied by 2^(−p·bits). 0, as in the paper, leaves them as they are.
        pull: λ: strength of the pull towards the parameters of the last boundary. 0 is the paper. By default
            chosen at the first boundary, see :func:`lightning_blip.strengths.choose_pull`; 3 in the Kronecker
            basis.
        damping: δ: how much of a layer's information counts for all of its outputs alike. 0 is the paper. By
            default chosen at the first boundary, see :func:`lightning_blip.strengths.choose_damping`; 0.2 in
            the Kronecker basis.
        every: The most steps from one pull to the next. Each makes up for all steps since the last one.
        expected_tasks: How many tasks the prior is to leave room for.
        forgetting_budget: What the frozen bits alone may allow to be forgotten, in nats a sample of each
            task; it tells the prior, instead of a share of the bits.
        average: Whether a task ends with the mean of its weights over the last fifth of its training, each
            taken right after a pull. Not where ``TaskStopping`` restores its best weights, nor in a loop of
            one's own.
        rank: The most directions that are kept of a layer's inputs, and of its outputs, in the Kronecker
            basis; all by default.
        samples: How many training samples of a task are used to estimate its Fisher information.
        smoothing: The share of labels that are drawn uniformly instead of from the network's prediction. A
            network that is sure of every sample has no Fisher information, and forgets all the same: where
            tasks are learned to nearly 100 %, more than the default remembers better.
        likelihood: What the network's output parametrises: ``"categorical"`` (logits), ``"gaussian"`` (unit
            variance), ``"bernoulli"`` (logits), or a callable that makes a ``torch.distributions``
            distribution of it.
        labels: ``"sampled"`` from the network's own prediction (the Fisher information), or the data's
            (``"empirical"``).
        include: Name patterns (``"body.*"``) of the parameters to track; all by default.
        exclude: Name patterns of parameters to leave alone.
        norm_stats: What becomes of the running statistics of BatchNorm and its kin, which no bits hold.
            ``"per_task"``: each task has its own; in validation and test those of the loader's task are in
            place (by hand: :meth:`use_task`). ``"freeze"``: the first task's stay, and normalise in the
            training of later tasks, too. ``"shared"``: they follow the current task, as in the paper. By
            default ``"per_task"`` for a network with :class:`TaskHeads`, where the task is known in
            evaluation, else ``"shared"``: one head for tasks whose inputs differ learns them better so.
        fan: Which size of a layer tells how far its weights may go, B = 6/√fan, and by how much its prior is
            multiplied. ``"in"``: the inputs of each output, by which weights are usually drawn. ``"max"``:
            those, or the number of outputs (of a convolution, its channels), if there are more: the larger
            side of the matrix that orthogonal weights are made as.

    Raises:
        ValueError: If an argument is off. In a fit: if a pattern matches no parameter, a tracked parameter is
            in half precision, the module has no ``forward``, or the Trainer's strategy divides parameters.

    Example:
        >>> trainer = pl.Trainer(callbacks=[BLIP()], logger=False, enable_checkpointing=False)

    Source:
        Shi, Yuan, Chen, Feng: Continual Learning via Bit-Level Information Preserving, CVPR 2021.
    """

    def __init__(
        self,
        prior: float | Auto = "auto",
        max_bits: int = LARGEST_MAX_BITS,
        rule: Rule = "exact",
        cell: Cell = "strict",
        basis: Basis = "diagonal",
        scale: float = 0.0,
        pull: float | Auto = "auto",
        damping: float | Auto = "auto",
        every: int = 100,
        expected_tasks: int = 10,
        forgetting_budget: float | None = None,
        average: bool = True,
        rank: int | None = None,
        samples: int = 8_000,
        smoothing: float = 0.1,
        likelihood: Likelihood = "categorical",
        labels: Labels = "sampled",
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        norm_stats: NormStats | None = None,
        fan: Fan = "in",
    ) -> None:
        if prior != "auto" and (isinstance(prior, str) or not prior > 0):
            raise ValueError(
                f'prior={prior} must be positive, the information that counts as none, or "auto"'
            )
        if not 1 <= max_bits <= LARGEST_MAX_BITS:
            raise ValueError(
                f"max_bits={max_bits} must be 1 to {LARGEST_MAX_BITS}, what a float32 holds exactly"
            )
        for name, value, choices in (
            ("rule", rule, get_args(Rule)),
            ("cell", cell, get_args(Cell)),
            ("basis", basis, get_args(Basis)),
            ("labels", labels, get_args(Labels)),
            ("norm_stats", norm_stats, (*get_args(NormStats), None)),
            ("fan", fan, get_args(Fan)),
        ):
            if value not in choices:
                raise ValueError(f"{name}={value!r} must be one of {choices}")
        strengths = {"scale": scale, "pull": pull, "damping": damping}
        check_strengths(**{name: value for name, value in strengths.items() if value != "auto"})
        check_every(every)
        for name, count in (("samples", samples), ("expected_tasks", expected_tasks), ("rank", rank)):
            if count is not None and not count >= 1:
                raise ValueError(f"{name}={count} must be at least 1")
        if forgetting_budget is not None and not forgetting_budget > 0:
            raise ValueError(f"forgetting_budget={forgetting_budget} must be positive, in nats a sample")
        if not 0 <= smoothing <= 1:
            raise ValueError(f"smoothing={smoothing} must be 0 to 1, the share of labels drawn uniformly")
        if basis == "kronecker" and (rule == "paper" or scale > 0):
            raise ValueError(
                f"rule={rule!r} with scale={scale} is not known in basis='kronecker': "
                "take rule='exact' and scale=0, or basis='diagonal'"
            )
        self.prior = prior
        self.max_bits = max_bits
        self.rule: Rule = rule
        self.cell: Cell = cell
        self.basis: Basis = basis
        self.scale = scale
        self.pull = pull
        self.damping = damping
        self.every = every
        self.expected_tasks = expected_tasks
        self.forgetting_budget = forgetting_budget
        self.average = average
        self.rank = rank
        self.samples = samples
        self.smoothing = smoothing
        self.likelihood = likelihood
        self.labels: Labels = labels
        self.include = _patterns(include)
        self.exclude = _patterns(exclude)
        self.norm_stats: NormStats | None = norm_stats
        self.fan: Fan = fan
        self.tasks_learned = 0
        #: The prior, pull and damping in use: as given, or as chosen at the first boundary.
        self.chosen: dict[str, float] = {
            name: value
            for name, value in (("prior", prior), ("pull", pull), ("damping", damping))
            if not isinstance(value, str)
        }
        #: What the last boundary of this process measured and froze.
        self.last_boundary: BoundaryReport | None = None
        self._network = FrozenNetwork(max_bits, rule, cell, basis, rank, fan)
        self._wrappers: WeakSet[FrozenBitsOptimizer] = WeakSet()
        self._statistics = TaskStatistics()
        self._mean = MeanWeights()
        self._first_task = 0  # of the sequence, counted over all the tasks that were ever learned

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
        fan: Fan = "in",
        batch_size: int = 100,
    ) -> BLIP:
        """BLIP as the paper has it, to the letter.

        The paper's settings: ``BLIP.paper(prior=1e-15)`` for MNIST, ``BLIP.paper(prior=5e-18, fan="max",
        batch_size=62)`` for Atari, where weights begin orthogonal and the information was measured on
        a rollout of 2,000 steps in 32 parts.

        Args:
            prior: F_prior as the paper's code counts it, see ``batch_size``.
            max_bits: See :class:`BLIP`, as for the other arguments.
            samples: Samples of the estimate.
            likelihood: Of the network's output.
            labels: Sampled or empirical.
            include: Parameters to track.
            exclude: Parameters to leave alone.
            fan: See :class:`BLIP`.
            batch_size: Of the batches that the paper's code averaged its loss over before it squared its
                gradients: ``prior`` is converted to the true Fisher information's scale, ``batch_size``²
                times as large. It is 100 in its experiments with images but mini-ImageNet (10), and 62 with
                Atari. Your own batches have no part in it.

        Returns:
            The callback.

        Raises:
            ValueError: If an argument is off.

        Example:
            >>> blip = BLIP.paper()
            >>> blip.rule, blip.cell, blip.scale, blip.pull
            ('paper', 'paper', 0.0, 0.0)
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1: that of the paper's code is 100")
        return cls(
            prior * batch_size**2,
            max_bits,
            rule="paper",
            cell="paper",
            scale=0.0,
            pull=0.0,
            damping=0.0,
            average=False,
            smoothing=0.0,
            samples=samples,
            likelihood=likelihood,
            labels=labels,
            include=include,
            exclude=exclude,
            norm_stats="shared",
            fan=fan,
        )

    def bits(self) -> dict[str, Tensor]:
        """How many leading bits of each parameter are frozen: uint8, by parameter name.

        Of a layer in the Kronecker basis, by the name of its weight: of each coordinate ω, (out, in), or
        (out, in + 1) where there is a bias.
        """
        return self._network.bits()

    def precision(self) -> dict[str, Tensor]:
        """S_t of the exact rule, or F_{0:t} of the paper's: float32, by name, as :meth:`bits`."""
        return self._network.precision()

    @property
    def used_capacity(self) -> float:
        """The share of all bits that are frozen, Σ bits / Σ N, 0 to 1."""
        return self._network.used_capacity

    def predicted_forgetting(self, module: nn.Module) -> float:
        """What a network has forgotten since the last boundary, as its information tells, without any data.

        It is there to compare moments and tasks of one run. As an amount it is too low: in the Kronecker
        basis by what the second order leaves out, in the diagonal one by far, since it leaves out how
        parameters move together.

        Args:
            module: The network.

        Returns:
            ½·Σ (S_t − S_0)·(θ − θ*)²/t, the rise of the past tasks' loss to second order, in nats a sample.

        Example:
            >>> network, blip = nn.Linear(4, 2), BLIP()
            >>> report = blip.consolidate(network, [(torch.randn(8, 4), torch.zeros(8))])
            >>> before = blip.predicted_forgetting(network)
            >>> network.weight.data += 0.1
            >>> blip.predicted_forgetting(network) > before
            True
        """
        if not self.tasks_learned:
            return 0.0
        self._network.attach(module, self._tracked(module))
        return self._network.strain(module)[0]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuses strategies that it cannot work with, before they change the module."""
        if not is_a(trainer.strategy, "SingleDeviceStrategy", "DDPStrategy"):
            raise ValueError(
                f"strategy={type(trainer.strategy).__name__} may divide the parameters, whose bits are "
                "frozen value by value: use strategy='ddp', or devices=1"
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds out early whether it can work with the module."""
        if not overrides(pl_module, "forward"):
            raise ValueError(
                f"{type(pl_module).__name__} has no forward: define forward(inputs), which training_step may "
                "call as well, so that BLIP can ask the network for its prediction"
            )
        self._attach(pl_module)
        if has_tasks(trainer):
            self._first_task = self.tasks_learned - sequence(trainer).learned
            define_axis(trainer, "blip", self._logged_names())
        elif not self.tasks_learned:
            datamodule = type(trainer.datamodule).__name__  # type: ignore[attr-defined]
            rank_zero_warn(
                f"datamodule={datamodule} has no tasks: nothing is consolidated by itself. Pass a "
                "TaskSequenceDataModule, or call blip.consolidate(trainer, dataloader) after the fit"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Protects the parameters, whether or not tasks come from a sequence."""
        self._protect(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Finds out early whether the batches are such that information can be estimated from them."""
        if batch_idx == 0 and has_tasks(trainer):
            inputs_and_targets(batch)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Stops before a loss that is not finite moves anything.

        Looking at a loss waits for the device: other than on the CPU it is done as often as Lightning logs.
        """
        loop = trainer.fit_loop.epoch_loop
        if loss.device.type != "cpu" and optimizer_steps(trainer) % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        if not loss.isfinite().all():
            task = f"Task {sequence(trainer).task.name!r}: " if has_tasks(trainer) else ""
            raise FloatingPointError(
                f"{task}the loss is {loss.item()}, batch {loop.batch_idx} of epoch {trainer.current_epoch}: "
                "look for values in the data that are not finite, or take a smaller learning rate. What is "
                "frozen, and the weights, are those before this batch"
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Averages the end of a task, and logs what it has the past ones forget, without looking at them."""
        if is_accumulating(trainer):
            return
        if self.average and has_tasks(trainer):
            done = sequence(trainer).share_done(batch_idx + 1, trainer.num_training_batches)
            if done > _AVERAGED_FROM and self._network.just_pulled:
                self._mean.add(pl_module)
        steps = optimizer_steps(trainer)
        if self.tasks_learned and trainer.loggers and steps % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            place = {"blip/position": position(trainer)} if has_tasks(trainer) else {}
            log_metrics(trainer, self._state_of(pl_module) | place)

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Protects the parameters from the task's new optimizers."""
        self._protect(trainer, pl_module)

    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Consolidates the task that was just learned."""
        if not any(isinstance(one, TaskStopping) and one.restore_best for one in callbacks_of(trainer)):
            self._mean.put_in_place(pl_module)
        batches = TaskBatches(sequence(trainer).task_dataloader(), trainer)
        quiet = trainer.progress_bar_callback is None or not trainer.is_global_zero
        try:
            metrics = self._consolidate(pl_module, batches, quiet)
        except FloatingPointError as error:
            raise FloatingPointError(f"Task {task.name!r}: {error}") from error
        except Exception as error:
            raise RuntimeError(
                f"Task {task.name!r} was not consolidated, and what is frozen stays as it was: {error}"
            ) from error
        log_metrics(trainer, metrics | {"blip/position": task.index + 1.0})

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Puts the running statistics of the loader's task in place."""
        if has_tasks(trainer):
            self._statistics.show(pl_module, self._first_task + dataloader_idx)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts those of the current task in place again."""
        if has_tasks(trainer):
            self._statistics.back(pl_module)

    on_validation_start = on_test_start = on_predict_start = on_validation_end
    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    on_test_end = on_predict_end = on_validation_end

    def consolidate(self, module: nn.Module | pl.Trainer, dataloader: Iterable[Any]) -> dict[str, float]:
        """Takes in what a task told, by hand: for loops without a :class:`TaskSequenceDataModule`.

        Args:
            module: The network, just trained on the task, or the Trainer that trained it.
            dataloader: Batches ``(inputs, targets)`` of the task's training data, or mappings whose
                ``"labels"`` are the targets and the rest keyword arguments of the network.

        Returns:
            What is logged at a boundary, by name.

        Raises:
            ValueError: If there are no batches, or not such batches.
            FloatingPointError: If the loss is not finite; nothing is consolidated then.

        Example:
            >>> network = nn.Linear(4, 2)
            >>> blip = BLIP()
            >>> report = blip.consolidate(network, [(torch.randn(8, 4), torch.zeros(8))])
            >>> blip.tasks_learned, sorted(blip.bits())
            (1, ['bias', 'weight'])
        """
        if not isinstance(module, nn.Module):
            return self._consolidate(module.lightning_module, TaskBatches(dataloader, module))
        return self._consolidate(module, TaskBatches(dataloader))

    def wrap(self, optimizer: torch.optim.Optimizer, module: nn.Module) -> FrozenBitsOptimizer:
        """Protects the parameters from an optimizer, in a loop of one's own; a Trainer's are by themselves.

        Args:
            optimizer: Any optimizer over the module's parameters.
            module: The network.

        Returns:
            The optimizer to step instead.

        Example:
            >>> network = nn.Linear(4, 2)
            >>> optimizer = BLIP().wrap(torch.optim.SGD(network.parameters(), lr=0.1), network)
        """
        self._attach(module)
        wrapper = FrozenBitsOptimizer(
            optimizer,
            self._network.by_parameter(module),
            self.scale,
            self.chosen.get("pull", 0.0),
            self.every,
            self._network.by_layer(module),
        )
        self._wrappers.add(wrapper)
        return wrapper

    def use_task(self, module: nn.Module, task: int) -> None:
        """Gets a network ready to be evaluated on a task, in a loop of one's own.

        It puts the task's running statistics in place (with ``norm_stats="per_task"``) and makes its head
        active in every :class:`TaskHeads`. Before training goes on, ``use_task(module, blip.tasks_learned)``
        goes back to the task being learned.

        Args:
            module: The network.
            task: The task's index: 0 for the first that was consolidated.

        Raises:
            ValueError: If the task is neither learned nor the one being learned.

        Example:
            >>> from lightning_blip import TaskHeads
            >>> network, blip = nn.Sequential(nn.BatchNorm1d(4), TaskHeads(4, classes=[2, 2])), BLIP()
            >>> report = blip.consolidate(network, [(torch.randn(8, 4), torch.zeros(8))])
            >>> blip.use_task(network, 1)
            >>> network[1].active
            1
        """
        if not 0 <= task <= self.tasks_learned:
            raise ValueError(
                f"task={task} must be 0 to {self.tasks_learned}: one of the {self.tasks_learned} tasks "
                f"learned, or {self.tasks_learned} for the one being learned"
            )
        for heads in task_heads(module):
            # After the last task there may be no head for a next one.
            if task < len(heads) or task < self.tasks_learned:
                heads.active = task
        self._statistics.back(module)
        self._statistics.show(module, task)

    def state_dict(self) -> dict[str, Any]:
        """What was learned: goes into every checkpoint."""
        return {
            "version": VERSION,
            "tasks_learned": self.tasks_learned,
            "settings": self._settings(),
            "chosen": self.chosen,
            "frozen": self._network.state_dict(),
            "statistics": self._statistics.state_dict(),
            "first_task": self._first_task,
            "mean": self._mean.state_dict(),
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Warns of a checkpoint that knows nothing of BLIP."""
        if trainer.state.fn == "fit" and self.state_key not in checkpoint.get("callbacks", {}):
            rank_zero_warn(
                "The checkpoint was saved without BLIP: what it learned so far is not protected. Call "
                "blip.consolidate(module, dataloader) with the data of earlier tasks, if they are at hand."
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from what was saved; where it cannot, nothing is changed.

        Raises:
            ValueError: If it was learned with other settings, by a later version, or is damaged.
        """
        if state_dict.get("version", 0) > VERSION:
            raise ValueError(
                f"The checkpoint holds version {state_dict['version']} of what BLIP learned, this is version "
                f"{VERSION}: update lightning-blip"
            )
        try:
            self._check_settings(state_dict["settings"])
            network = FrozenNetwork(self.max_bits, self.rule, self.cell, self.basis, self.rank, self.fan)
            statistics, mean = TaskStatistics(), MeanWeights()
            network.load_state_dict(state_dict["frozen"])
            statistics.load_state_dict(state_dict["statistics"])
            mean.load_state_dict(state_dict["mean"])
            for name in ("tasks_learned", "first_task"):
                check_number(state_dict, name, 0)
            for name in state_dict["chosen"]:
                check_number(state_dict["chosen"], name, 0)
        except (AttributeError, KeyError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"What the checkpoint holds of BLIP is damaged, nothing was loaded of it: {error!r}"
            ) from error
        self.norm_stats = state_dict["settings"]["norm_stats"]
        self.tasks_learned, self._first_task = state_dict["tasks_learned"], state_dict["first_task"]
        self.chosen = dict(state_dict["chosen"])
        self._network, self._statistics, self._mean = network, statistics, mean

    def _check_settings(self, saved: Mapping[str, Any]) -> None:
        saved = {"fan": "in", **saved}  # which there was no other of at first
        for name, value in self._settings().items():
            if value is not None and saved[name] != value:
                raise ValueError(
                    f"{name}={value!r} differs from the checkpoint's {saved[name]!r}: "
                    f"resume with BLIP({name}={saved[name]!r})"
                )

    def _settings(self) -> dict[str, Any]:
        names = ("prior", "max_bits", "rule", "cell", "basis", "pull", "damping", "norm_stats", "fan")
        return {name: getattr(self, name) for name in names}

    def _protect(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        current = trainer.strategy.optimizers
        # A module may hand out the same optimizer again: it must not be wrapped twice.
        for wrapper in list(self._wrappers):
            if all(wrapper is not optimizer for optimizer in current):
                wrapper.unwrap()
                self._wrappers.discard(wrapper)
        trainer.strategy.optimizers = [
            optimizer if isinstance(optimizer, FrozenBitsOptimizer) else self.wrap(optimizer, pl_module)
            for optimizer in current
        ]

    def _attach(self, module: nn.Module) -> None:
        """Has a state on the right device for every tracked parameter, and the current task's statistics."""
        self._network.attach(module, self._tracked(module))
        if not self._network.names:
            raise ValueError(
                "No parameter is tracked, since all that are trained are inside TaskHeads or left out: "
                "nothing can be forgotten, leave out BLIP"
            )
        self._set_prior(module)
        if self.norm_stats is None:
            self.norm_stats = "per_task" if task_heads(module) else "shared"
        self._statistics.back(module)
        self._hold_statistics(module)

    def _hold_statistics(self, module: nn.Module) -> None:
        """Whoever guarded the network before, its running statistics move as this BLIP has them move."""
        if self.norm_stats == "freeze" and self.tasks_learned:
            freeze(module)
        else:
            thaw(module)

    def _tracked(self, module: nn.Module) -> dict[str, Tensor]:
        heads = {id(theta) for part in task_heads(module) for theta in part.parameters()}
        trainable = {
            name: theta
            for name, theta in module.named_parameters()
            if theta.requires_grad and id(theta) not in heads
        }
        for argument, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns or ():
                if not any(fnmatchcase(name, pattern) for name in trainable):
                    raise ValueError(
                        f"{argument}={pattern!r} matches none of the parameters {list(trainable)}"
                    )
        tracked: dict[str, Tensor] = {
            name: theta
            for name, theta in trainable.items()
            if (self.include is None or _matches(name, self.include))
            and not _matches(name, self.exclude or ())
        }
        for name, theta in tracked.items():
            if theta.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"Parameter {name!r} is {theta.dtype}, which does not hold {self.max_bits} bits: keep "
                    'it in float32 (precision="bf16-mixed" does), or leave it out with exclude'
                )
        return tracked

    def _set_prior(self, module: nn.Module) -> None:
        if "prior" in self.chosen:
            self._network.set_prior(module, self.chosen["prior"])

    @torch.no_grad()
    def _consolidate(self, module: nn.Module, batches: TaskBatches, quiet: bool = False) -> dict[str, float]:
        start = time.perf_counter()
        processes.share_buffers(module)
        self._attach(module)
        forgotten, at_walls = self._network.strain(module)
        shares = {"at_wall": at_walls, "drifted": self._network.drifted(module)}
        for wrapper in self._wrappers:
            wrapper.catch_up()
        self._network.settle(module)
        fishers, factors = self._estimate(module, batches, quiet)
        before = self.bits()
        gains = self._network.consolidate(module, fishers, factors)
        after = self.bits()
        shares["newly_frozen"] = sum(_newly_frozen(before[name], bits) for name, bits in after.items())
        for wrapper in self._wrappers:
            wrapper.pull = self.chosen.get("pull", 0.0)
        if self.norm_stats == "per_task":
            self._statistics.keep(module, self.tasks_learned)
        self.tasks_learned += 1
        self._hold_statistics(module)
        gained = _sum_by_layer(_in_order(module, gains))
        self.last_boundary = BoundaryReport(
            forgotten,
            self.used_capacity,
            **{f"{what}_share": count / self._network.values for what, count in shares.items()},
            strengths=dict(self.chosen),
            seconds=time.perf_counter() - start,
            layers={
                layer: LayerReport(gained.get(layer, 0.0), counts)
                for layer, counts in counts_by_layer(_in_order(module, after), self.max_bits).items()
            },
        )
        return self.last_boundary.metrics()

    def _estimate(
        self, module: nn.Module, batches: TaskBatches, quiet: bool
    ) -> tuple[dict[str, Tensor], dict[str, Factors]]:
        """The task's Fisher information by parameter name, and its factors by layer, damped."""
        own = dict(module.named_parameters())
        # A parameter that is not trained any more keeps what was frozen; nothing moves it.
        moving = [name for name in self._network.names if own[name].requires_grad]
        if not moving:
            return {}, {}
        layers = {
            weight: bias
            for weight, bias in self._network.biases.items()
            if weight in moving and (bias is None or bias in moving)
        }
        try:
            fishers, factors, overlaps = self._measure(module, moving, layers, batches, quiet)
        except (MemoryError, RuntimeError) as error:
            if not (isinstance(error, MemoryError) or is_oom_error(error)):
                raise
            garbage_collection_cuda()
            rank_zero_warn(f"Not enough memory to measure the information: again, by {_PARTS} parts a batch")
            fishers, factors, overlaps = self._measure(module, moving, layers, batches, quiet, _PARTS)
        for name, fisher in fishers.items():
            if not processes.average(fisher).isfinite().all():
                raise FloatingPointError(
                    f"The Fisher information of {name!r} is not finite, although the loss is: look for "
                    "gradients that overflow, such as of a square root at 0"
                )
        calibrated = {}
        for weight, factor in factors.factors().items():
            bias = layers[weight]
            trace = fishers[weight].sum() + (0.0 if bias is None else fishers[bias].sum())
            A, G = processes.average(factor.A), processes.average(factor.G)
            calibrated[weight] = Factors(A, G).calibrated(trace)
        for weight in layers.keys() - calibrated.keys():
            if fishers[weight].any():
                raise ValueError(
                    f"The layer of {weight!r} has no Kronecker factors, since its weight is used outside of "
                    f"its own operation: leave it out with exclude={weight!r}, or take basis='diagonal'"
                )
            calibrated[weight] = factors.nothing(weight)
        # A task that told nothing, as one of a single class, tells nothing to choose by either.
        if not any(fisher.any() for fisher in fishers.values()):
            return fishers, calibrated
        if not self._all_chosen:
            self._choose_strengths(fishers, overlaps)
        fishers, calibrated = damped(module, fishers, calibrated, self.chosen["damping"])
        if "prior" not in self.chosen:
            measured = self._network.measured(module, fishers, calibrated)
            self.chosen["prior"] = choose_prior(
                measured, self.max_bits, self.expected_tasks, self.forgetting_budget
            )
        self._set_prior(module)
        return fishers, calibrated

    def _measure(
        self,
        module: nn.Module,
        moving: Sequence[str],
        layers: Mapping[str, str | None],
        batches: TaskBatches,
        quiet: bool,
        parts: int = 1,
    ) -> tuple[dict[str, Tensor], FactorObserver, OverlapObserver]:
        """The Fisher information that this process sees, by parameter name, and what observers have seen."""
        own = dict(module.named_parameters())
        factors = FactorObserver(module, layers)
        overlaps = OverlapObserver(max(own[name].numel() for name in moving))
        rank, count = processes.place()
        samples = math.ceil(self.samples / count)
        with _progress_bar(min(samples, batches.samples or samples), quiet) as progress:
            fishers = diagonal_fisher(
                module,
                batches,
                likelihood=self.likelihood,
                labels=self.labels,
                samples=samples,
                smoothing=self.smoothing,
                generator=torch.Generator().manual_seed(self.tasks_learned),
                parameters=moving,
                observers=[
                    factors,
                    *([overlaps] if self.basis == "diagonal" and not self._all_chosen else []),
                ],
                shard=(rank, count),
                parts=parts,
                progress=progress,
            )
        return fishers, factors, overlaps

    @property
    def _all_chosen(self) -> bool:
        return {"pull", "damping"} <= self.chosen.keys()

    def _choose_strengths(self, fishers: Mapping[str, Tensor], overlaps: OverlapObserver) -> None:
        """Chooses pull and damping, where they are not given."""
        seen = [fishers[name] for name in sorted(overlaps.names)]
        trace = float(sum(fisher.sum() for fisher in seen))
        norms = [norm for norm in processes.gathered(overlaps.squared_norm()) if norm is not None]
        norm = sum(norms) / max(len(norms), 1)
        pull, damping = KRONECKER_PULL, KRONECKER_DAMPING
        if self.basis == "diagonal" and norm and trace:
            pull = choose_pull(norm, float(sum(fisher.double().square().sum() for fisher in seen)))
            damping = choose_damping(norm, trace)
        self.chosen = {"pull": pull, "damping": damping, **self.chosen}

    def _logged_names(self) -> list[str]:
        """Names of what is logged, behind ``blip/``."""
        return metric_names(dict.fromkeys(map(layer_of, self._network.states)))

    def _state_of(self, module: nn.Module) -> dict[str, float]:
        """What is logged while a task trains."""
        forgotten, at_walls = self._network.strain(module)
        return {
            "blip/predicted_forgetting": forgotten,
            "blip/used_capacity": self.used_capacity,
            "blip/at_wall_share": at_walls / max(self._network.values, 1),
        }


def _sum_by_layer(values: Mapping[str, Tensor]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for name, value in values.items():
        sums[layer_of(name)] = sums.get(layer_of(name), 0.0) + float(value.sum())
    return sums


def _in_order(module: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: values[name] for name, _ in module.named_parameters() if name in values}


def _newly_frozen(before: Tensor, after: Tensor) -> int:
    """How many values, or coordinates in order of their eigenvalues, have more frozen bits than before."""
    known = torch.zeros_like(after)
    known[tuple(slice(size) for size in before.shape)] = before
    return int((after > known).sum())


def _patterns(patterns: str | Sequence[str] | None) -> list[str] | None:
    return [patterns] if isinstance(patterns, str) else None if patterns is None else list(patterns)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


@contextmanager
def _progress_bar(samples: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar over samples, shown only if the work takes longer than a second."""
    bar = Progress(transient=True)
    task = bar.add_task("Fisher information", total=samples)
    start = time.monotonic()

    def progress(done: int) -> None:
        bar.advance(task, done)
        seen = bar.console.is_terminal or bar.console.is_jupyter
        if seen and not quiet and not bar.live.is_started and time.monotonic() - start > 1.0:
            bar.start()

    try:
        yield progress
    finally:
        if bar.live.is_started:
            bar.stop()
