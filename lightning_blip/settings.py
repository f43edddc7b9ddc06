"""The arguments of BLIP as one frozen dataclass: defaults, all checks, the paper's preset, and resuming."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Literal, get_args

import torch

from lightning_blip.fisher.arguments import check_labels, check_likelihood, check_samples, check_smoothing
from lightning_blip.frozen.base import Freezing
from lightning_blip.frozen.gains import RuleName
from lightning_blip.frozen.network import BasisName, FanName
from lightning_blip.frozen.packing import LARGEST_MAX_BITS, CellName
from lightning_blip.optim.optimizer import check_every, check_strengths
from lightning_blip.tasks.norm_stats import NormStats

Likelihood = str | Callable[[Any], torch.distributions.Distribution]
Labels = Literal["sampled", "empirical"]
Auto = Literal["auto"]

# The arguments that are numbers, with what may be given instead of one.
_NUMBERS: dict[str, tuple[Any, ...]] = {
    "prior": ("auto",),
    "pull": ("auto",),
    "damping": ("auto",),
    "scale": (),
    "smoothing": (),
    "forgetting_budget": (None,),
}
_WHOLE_NUMBERS: dict[str, tuple[Any, ...]] = {
    "max_bits": (),
    "every": (),
    "expected_tasks": (),
    "rank": (None,),
    "samples": (),
}
# A run that is resumed must have the values of these settings that it began with.
_FIXED = ("prior", "max_bits", "rule", "cell", "basis", "rank", "pull", "damping", "norm_stats", "fan")


#: The paper's preset, see :meth:`lightning_blip.BLIP.paper`.
PAPER: dict[str, Any] = {
    "rule": "paper",
    "cell": "paper",
    "scale": 0.0,
    "pull": 0.0,
    "damping": 0.0,
    "average": False,
    "smoothing": 0.0,
    "norm_stats": "shared",
}


@dataclass(frozen=True, eq=False)
class Settings:
    """The arguments of :class:`lightning_blip.BLIP`.

    Attributes:
        prior: F_0, the information per input of a layer (see ``fan``) and per sample that counts as none. A
            larger prior freezes fewer bits. By default chosen at the first boundary, see
            :func:`lightning_blip.strengths.choose_prior`.
        max_bits: N, the largest number of bits of a parameter that can be frozen, 1 to 20.
        rule: ``"exact"``: the bits follow from the posterior precision S_t = S_{t−1} + F_t, and the free bits
            keep their values. ``"paper"``: they follow from the running mean of the Fisher information, and
            parameters are rounded to their frozen bits. Diagonal basis only.
        cell: ``"strict"``: frozen bits never change. ``"paper"``: a parameter stays within ±B·2^−bits of its
            value at the last boundary. Diagonal basis only.
        basis: ``"diagonal"``: information is measured parameter by parameter. ``"kronecker"``: information of
            linear maps and convolutions is measured in the eigenbasis of their Kronecker-factored Fisher
            information, where the Fisher matrix is much closer to diagonal; it remembers more and takes more
            memory. See :class:`lightning_blip.frozen.kronecker.KroneckerState`.
        scale: p: steps are multiplied by 2^(−p·bits). 0, as in the paper, leaves them as they are. Diagonal
            basis only.
        pull: λ, the strength of the pull towards the parameters of the last boundary. 0 is the paper. By
            default chosen at the first boundary, see :func:`lightning_blip.strengths.choose_pull`; 3 in the
            Kronecker basis.
        damping: δ, the part of a layer's information that is spread evenly over its outputs. 0 is the paper.
            By default chosen at the first boundary, see :func:`lightning_blip.strengths.choose_damping`; 0.2
            in the Kronecker basis.
        every: The largest number of steps from one pull to the next. Each pull makes up for all steps since
            the last one.
        expected_tasks: The number of tasks that the chosen prior leaves room for.
        forgetting_budget: The forgetting that the frozen bits alone may allow, in nats per sample of each
            task; the prior is chosen by it instead of by a share of the bits.
        average: Whether a task ends with the mean of its weights over the last fifth of its training, each
            taken right after a pull. Not where ``TaskStopping`` restores the best weights, nor in a loop of
            your own.
        rank: The largest number of directions that are kept of a layer's inputs, and of its outputs; all by
            default. Kronecker basis only.
        samples: The number of training samples of a task that its Fisher information is estimated from.
        smoothing: The share of labels that are drawn uniformly instead of from the network's prediction. A
            network that is sure of every sample has no Fisher information, and forgets all the same: where
            tasks are learned to nearly 100 %, a larger share remembers better. Without effect where labels
            are not drawn, or are real numbers.
        likelihood: The distribution that the network's output stands for: ``"categorical"`` (logits),
            ``"gaussian"`` (unit variance), ``"bernoulli"`` (logits), or a callable that makes a
            ``torch.distributions`` distribution of it.
        labels: ``"sampled"`` from the network's own prediction (the Fisher information), or the data's
            (``"empirical"``).
        include: Name patterns (``"body.*"``) of the parameters to track; all by default.
        exclude: Name patterns of parameters to leave alone.
        norm_stats: The running statistics of BatchNorm and similar layers, which are no parameters.
            ``"per_task"``: each task has its own; in validation and test those of the loader's task are in
            use (by hand: :meth:`lightning_blip.BLIP.use_task`). ``"freeze"``: those of the first task are
            used for all, also in the training of later tasks. ``"shared"``: they follow the current task, as
            in the paper. By default ``"per_task"`` for a network with :class:`lightning_blip.TaskHeads`,
            where the task is known in evaluation, else ``"shared"``: one head learns tasks with different
            inputs better so.
        fan: The size of a layer that its bound B = 6/√fan and its prior depend on. ``"in"``: the number of
            inputs, by which weights are usually initialised. ``"max"``: the larger of inputs and outputs (of
            a convolution, its channels), which is the larger side of an orthogonal initialisation.

    Raises:
        ValueError: If an argument is not allowed, or has no effect together with another one.

    Example:
        >>> Settings(basis="kronecker", rank=16).rank
        16
    """

    prior: float | Auto = "auto"
    max_bits: int = LARGEST_MAX_BITS
    rule: RuleName = "exact"
    cell: CellName = "strict"
    basis: BasisName = "diagonal"
    scale: float = 0.0
    pull: float | Auto = "auto"
    damping: float | Auto = "auto"
    every: int = 100
    expected_tasks: int = 10
    forgetting_budget: float | None = None
    average: bool = True
    rank: int | None = None
    samples: int = 8_000
    smoothing: float = 0.1
    likelihood: Likelihood = "categorical"
    labels: Labels = "sampled"
    include: str | Sequence[str] | None = None
    exclude: str | Sequence[str] | None = None
    norm_stats: NormStats | None = None
    fan: FanName = "in"

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_types()
        self._check_numbers()
        self._check_combinations()
        check_likelihood(self.likelihood)
        check_samples(self.samples)
        check_smoothing(self.smoothing)
        check_labels(self.labels)

    @property
    def freezing(self) -> Freezing:
        """How information becomes frozen bits."""
        return Freezing(self.max_bits, self.rule, self.cell, self.rank)

    @property
    def given_strengths(self) -> dict[str, float]:
        """Those of prior, pull and damping that are not to be chosen."""
        strengths = {"prior": self.prior, "pull": self.pull, "damping": self.damping}
        return {name: value for name, value in strengths.items() if not isinstance(value, str)}

    def as_dict(self) -> dict[str, Any]:
        """Return every argument by name."""
        return {one.name: getattr(self, one.name) for one in fields(Settings)}

    def fixed(self) -> dict[str, Any]:
        """Return the arguments that a resumed run may not change."""
        return {name: getattr(self, name) for name in _FIXED}

    def check_resumes(self, saved: Mapping[str, Any]) -> None:
        """Raise an error where a checkpoint was made with other settings.

        Args:
            saved: What :meth:`fixed` returned when the checkpoint was saved.

        Raises:
            ValueError: If a setting differs; the error says how to resume.
        """
        for name, value in self.fixed().items():
            chosen_by_itself = name == "norm_stats" and value is None
            if not chosen_by_itself and saved[name] != value:
                raise ValueError(
                    f"{name}={value!r} differs from the checkpoint's {saved[name]!r}: "
                    f"resume with BLIP({name}={saved[name]!r})"
                )

    def _check_choices(self) -> None:
        for name, choices in (
            ("rule", get_args(RuleName)),
            ("cell", get_args(CellName)),
            ("basis", get_args(BasisName)),
            ("norm_stats", (*get_args(NormStats), None)),
            ("fan", get_args(FanName)),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name}={value!r} must be one of {choices}")

    def _check_types(self) -> None:
        for name, other in _NUMBERS.items():
            value = getattr(self, name)
            is_number = isinstance(value, Real) and not math.isinf(value)
            if not is_number and value not in other:
                alternative = "".join(f', or "{one}"' for one in other if one is not None)
                raise ValueError(f"{name}={value!r} must be a number{alternative}")
        for name, other in _WHOLE_NUMBERS.items():
            value = getattr(self, name)
            if not isinstance(value, Integral) and value not in other:
                raise ValueError(f"{name}={value!r} must be a whole number")
        if not isinstance(self.average, bool):
            raise ValueError(f"average={self.average!r} must be True or False")

    def _check_numbers(self) -> None:
        if not isinstance(self.prior, str) and not self.prior > 0:
            raise ValueError(
                f'prior={self.prior} must be positive, the information that counts as none, or "auto"'
            )
        if not 1 <= self.max_bits <= LARGEST_MAX_BITS:
            raise ValueError(
                f"max_bits={self.max_bits} must be 1 to {LARGEST_MAX_BITS}, what a float32 holds exactly"
            )
        strengths = {name: value for name, value in self.given_strengths.items() if name != "prior"}
        check_strengths(scale=self.scale, **strengths)
        check_every(self.every)
        for name in ("expected_tasks", "rank"):
            count = getattr(self, name)
            if count is not None and not count >= 1:
                raise ValueError(f"{name}={count} must be at least 1")
        if self.forgetting_budget is not None and not self.forgetting_budget > 0:
            raise ValueError(
                f"forgetting_budget={self.forgetting_budget} must be positive, in nats per sample"
            )

    def _check_combinations(self) -> None:
        """Raise an error for an argument that would have no effect."""
        if self.basis == "kronecker":
            alone = {"rule": "exact", "cell": "strict", "scale": 0.0}
            for name, only in alone.items():
                if getattr(self, name) != only:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} is not known in basis='kronecker': "
                        f"leave it out, or take basis='diagonal'"
                    )
        elif self.rank is not None:
            raise ValueError(
                f"rank={self.rank} has no effect in basis={self.basis!r}: leave it out, or take "
                "basis='kronecker'"
            )
        if self.forgetting_budget is not None and self.prior != "auto":
            raise ValueError(
                f"forgetting_budget={self.forgetting_budget} chooses the prior, and has no effect beside "
                f"prior={self.prior}: give one of the two"
            )
