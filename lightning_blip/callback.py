"""BLIP: after each task it freezes the bits that the task's information fixes, and keeps them frozen."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from pytorch_lightning.utilities.model_helpers import is_overridden
from rich.progress import Progress
from torch import Tensor, nn

from lightning_blip.bits import LARGEST_MAX_BITS, Cell, FrozenBits, bound
from lightning_blip.boundaries import log_metrics, sequence
from lightning_blip.datamodule import TaskSequenceDataModule
from lightning_blip.fisher import diagonal_fisher
from lightning_blip.heads import TaskHeads
from lightning_blip.information import Rule, consolidate, rule_precision
from lightning_blip.norm_stats import NormStats, TaskStatistics, freeze, thaw
from lightning_blip.optimizer import FrozenBitsOptimizer, check_strengths
from lightning_blip.streams import Task

Likelihood = str | Callable[[Any], torch.distributions.Distribution]
Labels = Literal["sampled", "empirical"]

# The batch that the paper's code averages its loss over: its Fisher is the true one over the square of this.
_PAPERS_BATCH_SIZE = 100


class BLIP(pl.Callback):
    """Bit-Level Information Preserving: learns tasks one after another without forgetting the earlier ones.

    After each task it estimates the information that the task's data gave every parameter, and freezes that
    many of the parameter's leading bits; the optimizer moves what is left free. No data is kept, and the
    memory does not grow with the number of tasks: 6 bytes a parameter, of which a checkpoint needs 3 (in the
    strict cell, under the exact rule; at most 6 otherwise). Only in the midst of a step do optimizers other
    than SGD need a copy of the parameters. (Running statistics may be kept of each task, see
    ``norm_stats``: a few numbers a channel.)

    With a :class:`TaskSequenceDataModule` all is done by itself. With a loop of one's own, call
    :meth:`consolidate` after each task; the same object, added to the next Trainer, goes on.

    It tracks every trainable parameter but those inside :class:`TaskHeads`, and logs at each boundary, to
    every logger: ``blip/used_capacity`` (Σ bits / Σ N), ``blip/information_gain`` (bits, summed, and for each
    layer), ``blip/newly_frozen_share`` (of the parameters, those with more frozen bits than before the task),
    ``blip/at_wall_share`` (those that the task pushed against their frozen bits), ``blip/drifted_share``
    (those whose frozen bits changed all the same: none in the strict cell) and ``blip/seconds``.

    Args:
        prior: F_0, the information per input of a layer and sample that counts as none. A larger one freezes
            less.
        max_bits: N, the most bits of a parameter that can be frozen, 1 to 20.
        rule: ``"exact"``: the posterior precision S_t = S_{t−1} + F_t tells the bits, and the free bits keep
            their values. ``"paper"``: the running mean of the Fisher does, and parameters are rounded to
            their frozen bits.
        cell: ``"strict"``: frozen bits never change. ``"paper"``: a parameter stays within ±B·2^−bits of
            where it was at the last boundary.
        scale: p: steps are multiplied by 2^(−p·bits). 0 is the paper.
        pull: λ: strength of the pull towards the parameters of the last boundary. 0 is the paper.
        samples: How many training samples of a task are used to estimate its Fisher information.
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

    Raises:
        ValueError: If an argument is off. In a fit: if a pattern matches no parameter, a tracked parameter is
            in half precision, the module has no ``forward``, or the Trainer runs several processes.

    Example:
        >>> trainer = pl.Trainer(callbacks=[BLIP()], logger=False, enable_checkpointing=False)

    Source:
        Shi, Yuan, Chen, Feng: Continual Learning via Bit-Level Information Preserving, CVPR 2021.
    """

    def __init__(
        self,
        prior: float = 1e-6,
        max_bits: int = LARGEST_MAX_BITS,
        rule: Rule = "exact",
        cell: Cell = "strict",
        scale: float = 0.5,
        pull: float = 3.0,
        samples: int = 8_000,
        likelihood: Likelihood = "categorical",
        labels: Labels = "sampled",
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        norm_stats: NormStats | None = None,
    ) -> None:
        if not prior > 0:
            raise ValueError(f"prior={prior} must be positive: it is the information that counts as none")
        if not 1 <= max_bits <= LARGEST_MAX_BITS:
            raise ValueError(
                f"max_bits={max_bits} must be 1 to {LARGEST_MAX_BITS}, what a float32 holds exactly"
            )
        for name, value, choices in (
            ("rule", rule, get_args(Rule)),
            ("cell", cell, get_args(Cell)),
            ("labels", labels, get_args(Labels)),
            ("norm_stats", norm_stats, (*get_args(NormStats), None)),
        ):
            if value not in choices:
                raise ValueError(f"{name}={value!r} must be one of {choices}")
        check_strengths(scale=scale, pull=pull)
        if samples < 1:
            raise ValueError(f"samples={samples} must be at least 1")
        self.prior = prior
        self.max_bits = max_bits
        self.rule: Rule = rule
        self.cell: Cell = cell
        self.scale = scale
        self.pull = pull
        self.samples = samples
        self.likelihood = likelihood
        self.labels: Labels = labels
        self.include = _patterns(include)
        self.exclude = _patterns(exclude)
        self.norm_stats: NormStats | None = norm_stats
        self.tasks_learned = 0
        self._frozen: dict[str, FrozenBits] = {}
        self._wrappers: list[FrozenBitsOptimizer] = []
        self._statistics = TaskStatistics()
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
    ) -> BLIP:
        """BLIP as the paper has it, to the letter.

        Args:
            prior: F_prior as the paper counts it, from the gradient of a loss averaged over batches of 100;
                it is converted to the true Fisher information's scale, 100² times as large.
            max_bits: See :class:`BLIP`, as for the other arguments.
            samples: Samples of the estimate.
            likelihood: Of the network's output.
            labels: Sampled or empirical.
            include: Parameters to track.
            exclude: Parameters to leave alone.

        Returns:
            The callback.

        Example:
            >>> blip = BLIP.paper()
            >>> blip.rule, blip.cell, blip.scale, blip.pull
            ('paper', 'paper', 0.0, 0.0)
        """
        return cls(
            prior * _PAPERS_BATCH_SIZE**2,
            max_bits,
            rule="paper",
            cell="paper",
            scale=0.0,
            pull=0.0,
            samples=samples,
            likelihood=likelihood,
            labels=labels,
            include=include,
            exclude=exclude,
            norm_stats="shared",
        )

    def bits(self) -> dict[str, Tensor]:
        """How many leading bits of each parameter are frozen: uint8, by parameter name."""
        return {name: frozen.bits for name, frozen in self._frozen.items()}

    def precision(self) -> dict[str, Tensor]:
        """S_t of the exact rule, or F_{0:t} of the paper's: float32, by parameter name."""
        return {name: rule_precision(frozen, self.rule) for name, frozen in self._frozen.items()}

    @property
    def used_capacity(self) -> float:
        """The share of all bits that are frozen, Σ bits / Σ N, 0 to 1."""
        bits = self.bits().values()
        total = sum(part.numel() for part in bits) * self.max_bits
        return sum(int(part.sum()) for part in bits) / total if total else 0.0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds out early whether it can work with the module."""
        if trainer.world_size > 1:
            raise ValueError(
                f"The Trainer runs {trainer.world_size} processes, each of which would freeze other bits: "
                "train with devices=1"
            )
        if not is_overridden("forward", pl_module):
            raise ValueError(
                f"{type(pl_module).__name__} has no forward: define forward(inputs), which training_step may "
                "call as well, so that BLIP can ask the network for its prediction"
            )
        self._attach(pl_module)
        if _has_tasks(trainer):
            self._first_task = self.tasks_learned - sequence(trainer).learned

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Protects the parameters, whether or not tasks come from a sequence."""
        self._protect(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Finds out early whether the batches are such that information can be estimated from them."""
        if batch_idx == 0 and _has_tasks(trainer):
            _inputs_and_targets(batch)

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Protects the parameters from the task's new optimizers."""
        self._protect(trainer, pl_module)

    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Consolidates the task that was just learned."""
        loader = trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]
        quiet = trainer.progress_bar_callback is None
        try:
            report = self._consolidate(pl_module, _as_in_training(trainer, loader), _size(loader), quiet)
        except FloatingPointError as error:
            raise FloatingPointError(f"Task {task.name!r}: {error}") from error
        log_metrics(trainer, report)

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Puts the running statistics of the loader's task in place."""
        if _has_tasks(trainer):
            self._statistics.show(pl_module, self._first_task + dataloader_idx)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts those of the current task in place again."""
        if _has_tasks(trainer):
            self._statistics.back(pl_module)

    on_validation_start = on_test_start = on_validation_end
    on_test_batch_start = on_validation_batch_start
    on_test_end = on_validation_end

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
            FloatingPointError: If the loss is not finite; nothing has changed then.

        Example:
            >>> network = nn.Linear(4, 2)
            >>> blip = BLIP()
            >>> report = blip.consolidate(network, [(torch.randn(8, 4), torch.zeros(8))])
            >>> blip.tasks_learned, sorted(blip.bits())
            (1, ['bias', 'weight'])
        """
        if isinstance(module, pl.Trainer):
            batches = _as_in_training(module, dataloader)
            return self._consolidate(module.lightning_module, batches, _size(dataloader))
        return self._consolidate(module, dataloader, _size(dataloader))

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
        parameters = dict(module.named_parameters())
        frozen: Mapping[Tensor, FrozenBits] = {
            parameters[name]: state for name, state in self._frozen.items()
        }
        return FrozenBitsOptimizer(optimizer, frozen, self.scale, self.pull)

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
        for heads in _heads(module):
            # After the last task there may be no head for a next one.
            if task < len(heads) or task < self.tasks_learned:
                heads.active = task
        self._statistics.back(module)
        self._statistics.show(module, task)

    def state_dict(self) -> dict[str, Any]:
        """What was learned: goes into every checkpoint."""
        return {
            "tasks_learned": self.tasks_learned,
            "settings": self._settings(),
            "frozen": {name: frozen.state_dict() for name, frozen in self._frozen.items()},
            "statistics": self._statistics.state_dict(),
            "first_task": self._first_task,
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
        """Goes on from what was saved.

        Raises:
            ValueError: If it was learned with other settings.
        """
        for name, value in self._settings().items():
            if value is not None and state_dict["settings"][name] != value:
                raise ValueError(
                    f"{name}={value!r} differs from the checkpoint's {state_dict['settings'][name]!r}: "
                    f"resume with BLIP({name}={state_dict['settings'][name]!r})"
                )
        self.norm_stats = state_dict["settings"]["norm_stats"]
        self.tasks_learned = state_dict["tasks_learned"]
        self._statistics.load_state_dict(state_dict["statistics"])
        self._first_task = state_dict["first_task"]
        self._frozen = {
            name: FrozenBits.from_state_dict(state) for name, state in state_dict["frozen"].items()
        }

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("prior", "max_bits", "rule", "cell", "norm_stats")}

    def _protect(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        current = trainer.strategy.optimizers
        # A module may hand out the same optimizer again: it must not be wrapped twice.
        for wrapper in self._wrappers:
            if all(wrapper is not optimizer for optimizer in current):
                wrapper.unwrap()
        self._wrappers = [
            optimizer if isinstance(optimizer, FrozenBitsOptimizer) else self.wrap(optimizer, pl_module)
            for optimizer in current
        ]
        trainer.strategy.optimizers = list(self._wrappers)

    def _attach(self, module: nn.Module) -> None:
        """Has a state on the right device for every tracked parameter, and the current task's statistics."""
        parameters = dict(module.named_parameters())
        missing = [name for name in self._frozen if name not in parameters]
        if missing:
            raise ValueError(
                f"The module has no parameters {missing}, which BLIP has learned about: "
                "use a new BLIP() for another network"
            )
        layers = _layers(module)
        for name, theta in self._tracked(module).items():
            if name not in self._frozen:
                fan_in, bias = layers.get(name, (None, False))
                self._frozen[name] = FrozenBits.of(
                    theta,
                    bound(theta, fan_in, bias=bias),
                    self.prior * (fan_in or 1),
                    self.max_bits,
                    self.cell,
                )
            elif self._frozen[name].packed.device != theta.device:
                self._frozen[name] = self._frozen[name].to(theta.device)
        # Lightning restores the module before it asks callbacks to start: the weights are the checkpoint's.
        for name, frozen in self._frozen.items():
            try:
                frozen.locate(parameters[name])
            except ValueError as error:
                raise ValueError(f"Parameter {name!r}: {error}") from error
        if self.norm_stats is None:
            self.norm_stats = "per_task" if _heads(module) else "shared"
        self._statistics.back(module)
        self._hold_statistics(module)

    def _hold_statistics(self, module: nn.Module) -> None:
        """Whoever guarded the network before, its running statistics move as this BLIP has them move."""
        if self.norm_stats == "freeze" and self.tasks_learned:
            freeze(module)
        else:
            thaw(module)

    def _tracked(self, module: nn.Module) -> dict[str, Tensor]:
        heads = {id(theta) for part in _heads(module) for theta in part.parameters()}
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

    @torch.no_grad()
    def _consolidate(
        self, module: nn.Module, batches: Iterable[Any], size: int | None, quiet: bool = False
    ) -> dict[str, float]:
        start = time.perf_counter()
        self._attach(module)
        parameters = dict(module.named_parameters())
        # A parameter that is not trained any more keeps what was frozen; nothing moves it.
        moving = {name: state for name, state in self._frozen.items() if parameters[name].requires_grad}
        with _progress_bar(min(self.samples, size or self.samples), quiet) as progress:
            fishers = diagonal_fisher(
                module,
                _pairs(batches),
                likelihood=self.likelihood,
                labels=self.labels,
                samples=self.samples,
                generator=torch.Generator().manual_seed(self.tasks_learned),
                parameters=list(moving),
                progress=progress,
            )
        for name, fisher in fishers.items():
            if not fisher.isfinite().all():
                raise FloatingPointError(
                    f"The Fisher information of {name!r} is not finite, although the loss is: look for "
                    "gradients that overflow, such as of a square root at 0"
                )
        counts = dict.fromkeys(("newly_frozen", "at_wall", "drifted"), 0)
        gains: dict[str, float] = {}
        for name, frozen in moving.items():
            theta, bits = parameters[name].data, frozen.bits
            low, high = frozen.limits(theta.dtype)
            anchored = frozen.frozen_code(frozen.anchor(theta.dtype))
            counts["at_wall"] += int(((bits > 0) & ((theta <= low) | (theta >= high))).sum())
            counts["drifted"] += int((frozen.frozen_code(theta) != anchored).sum())
            theta.clamp_(low, high)
            gain = consolidate(theta, frozen, fishers[name], self.rule)
            counts["newly_frozen"] += int((frozen.bits > bits).sum())
            layer = name.rpartition(".")[0] or name
            gains[layer] = gains.get(layer, 0.0) + float(gain.sum())
        if self.norm_stats == "per_task":
            self._statistics.keep(module, self.tasks_learned)
        self.tasks_learned += 1
        self._hold_statistics(module)
        values = sum(frozen.packed.numel() for frozen in self._frozen.values())
        return {
            "blip/used_capacity": self.used_capacity,
            "blip/information_gain": sum(gains.values()),
            **{f"blip/information_gain/{layer}": gain for layer, gain in gains.items()},
            **{f"blip/{what}_share": count / values for what, count in counts.items()},
            "blip/seconds": time.perf_counter() - start,
        }


def _patterns(patterns: str | Sequence[str] | None) -> list[str] | None:
    return [patterns] if isinstance(patterns, str) else None if patterns is None else list(patterns)


def _has_tasks(trainer: pl.Trainer) -> bool:
    return isinstance(trainer.datamodule, TaskSequenceDataModule)  # type: ignore[attr-defined]


def _heads(module: nn.Module) -> list[TaskHeads]:
    return [part for part in module.modules() if isinstance(part, TaskHeads)]


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _layers(module: nn.Module) -> dict[str, tuple[int, bool]]:
    """fan_in, and whether it is the bias, of every parameter of a Linear or Conv layer, by name."""
    layers = {}
    for prefix, part in module.named_modules():
        if isinstance(part, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            fan_in = part.weight[0].numel()
            for name in ("weight", "bias"):
                layers[f"{prefix}.{name}" if prefix else name] = (fan_in, name == "bias")
    return layers


def _inputs_and_targets(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, Mapping) and "labels" in batch:
        return {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]
    if isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) == 2:
        return batch[0], batch[1]
    raise ValueError(
        f"batch of type {type(batch).__name__} is neither a pair (inputs, targets) nor a mapping with "
        "'labels': have the data set give one of the two"
    )


def _pairs(batches: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """``(inputs, targets)`` of every batch; a loader draws no random number before the first is taken."""
    for batch in batches:
        yield _inputs_and_targets(batch)


def _as_in_training(trainer: pl.Trainer, dataloader: Iterable[Any]) -> Iterator[Any]:
    """The batches as ``training_step`` gets them: in the Trainer's precision, after the module's hooks."""
    for batch in dataloader:
        batch = trainer.precision_plugin.convert_input(batch)
        batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
        yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _size(dataloader: Iterable[Any]) -> int | None:
    """How many samples a loader has, where it can be known."""
    dataset = getattr(dataloader, "dataset", None)
    return len(dataset) if isinstance(dataset, Sized) else None


@contextmanager
def _progress_bar(samples: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar over samples, shown only if the work takes longer than a second."""
    bar = Progress(transient=True)
    task = bar.add_task("Fisher information", total=samples)
    start = time.monotonic()

    def progress(done: int) -> None:
        bar.advance(task, done)
        if not quiet and not bar.live.is_started and time.monotonic() - start > 1.0:
            bar.start()

    try:
        yield progress
    finally:
        if bar.live.is_started:
            bar.stop()
