"""``FrozenState``, the one interface of everything that is frozen, and what goes in and out of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_blip.fisher.gradients import SampleGradients
from lightning_blip.frozen.checks import check_number
from lightning_blip.frozen.gains import RuleName
from lightning_blip.frozen.packing import LARGEST_MAX_BITS, CellName


@dataclass(frozen=True)
class Freezing:
    """How information becomes frozen bits: the settings that all states of a network share.

    Attributes:
        max_bits: N, the largest number of bits that can be frozen.
        rule: ``"exact"`` or ``"paper"``, see :class:`lightning_blip.BLIP`.
        cell: ``"strict"`` or ``"paper"``, see :func:`lightning_blip.frozen.packing.cell_codes`.
        rank: The largest number of directions kept on each side of a layer; None for all.
    """

    max_bits: int = LARGEST_MAX_BITS
    rule: RuleName = "exact"
    cell: CellName = "strict"
    rank: int | None = None


@dataclass
class Pace:
    """Counts steps and adds up their learning rates, until a pull is due.

    Two pulls lie at most a twentieth of the steps since the boundary apart, so that short tasks have enough
    of them too.

    Attributes:
        total: The number of steps since the last boundary.
        steps: The number of steps since the last pull.
        rate: The sum of their learning rates.

    Example:
        >>> pace = Pace(total=100)
        >>> [pace.due(rate=0.5, every=2) for _ in range(4)]
        [0.0, 1.0, 0.0, 1.0]
    """

    total: int = 0
    steps: int = 0
    rate: float = 0.0

    def due(self, rate: float, every: int) -> float:
        """Record a step; return the accumulated learning rate if a pull is due, else 0.

        Args:
            rate: The step's learning rate.
            every: The largest number of steps from one pull to the next.
        """
        self.total += 1
        self.steps += 1
        self.rate += rate
        return self.collect() if self.steps >= min(every, 1 + self.total // 20) else 0.0

    def collect(self) -> float:
        """Return the accumulated learning rate, and start to accumulate from 0."""
        rate = self.rate
        self.steps, self.rate = 0, 0.0
        return rate


class TaskInformation(ABC):
    """The Fisher information that one task gave the parameters of one state."""

    @abstractmethod
    def damped(self, damping: float) -> TaskInformation:
        """Return the information with a part of it spread evenly over a layer's outputs.

        Args:
            damping: δ: each input's information F_ij becomes F_ij + δ·mean_i F_ij.
        """

    @abstractmethod
    def coordinates(self) -> Tensor:
        """Return the information of each coordinate, any shape; see :func:`choose_prior`."""


class Collector(ABC):
    """Collects what a state needs of the gradients of a task beside their squares, batch by batch."""

    def see(self, parameter: str, gradients: SampleGradients) -> None:  # noqa: B027  most need nothing more
        """Add the gradients of one parameter for one batch.

        Args:
            parameter: Its name.
            gradients: One gradient per sample.
        """

    def finish(self, samples: int) -> list[Tensor]:
        """End the collection.

        Args:
            samples: The number of samples that this process has seen.

        Returns:
            The collected means, to be averaged over all processes in place.
        """
        return []

    @abstractmethod
    def information(self, fishers: Mapping[str, Tensor]) -> TaskInformation:
        """Return the task's information.

        Args:
            fishers: F_t by parameter name, averaged over all processes.

        Raises:
            ValueError: If the gradients were of a kind that the state cannot use.
        """


@dataclass(eq=False, slots=True)
class Step:
    """A step that an optimizer has taken on the parameters of one state, and what is to hold it back.

    Attributes:
        parameters: The parameters after the step −factor·update; changed in place.
        state: Their state.
        pull: λ.
        rate: η, the accumulated learning rate if a pull is due, else 0.
        divisor: P, what the optimizer divides the gradients of the first parameter by; None for 1.
        update: The update of the first parameter; None where it is not to be scaled.
        factor: The factor of the update.
        seldom: Whether such steps are so rare that compiling a function for them does not pay.
    """

    parameters: Sequence[Tensor]
    state: FrozenState
    pull: float = 0.0
    rate: float = 0.0
    divisor: Tensor | None = None
    update: Tensor | None = None
    factor: float = 1.0
    seldom: bool = False

    @property
    def strength(self) -> float:
        """η·λ, the strength of the pull that is due; 0 for none."""
        return self.pull * self.rate


class Stepper:
    """Holds back the steps of all states of one class; one stepper per class and optimizer."""

    def __call__(self, steps: Iterable[Step], scale: float) -> None:
        """Hold back steps, in place.

        Args:
            steps: One step per state.
            scale: p: the update is multiplied by 2^(−p·bits).
        """
        for step in steps:
            step.state.hold_back(step)


class Strain(NamedTuple):
    """How far parameters have moved against what is frozen.

    Attributes:
        forgetting: ½·Σ (S − S_0)·(θ − θ*)²/t, in nats per sample.
        at_walls: The number of values at, or beyond, the walls of cells with frozen bits.
    """

    forgetting: float
    at_walls: int


@dataclass(eq=False)
class FrozenState(ABC):
    """What is frozen in one or several parameters that are measured, frozen and pulled together.

    A basis is one subclass, or several: the coordinates in which information is measured. To add one, write a
    subclass in a file of its own, and name it in :data:`lightning_blip.frozen.network.BASES`.

    Attributes:
        kind: The name of the class in checkpoints.
        prior: S_0, the precision before the first task, the same for all values.
        bound: B.
        freezing: How information becomes frozen bits.
        tasks: t, the number of tasks consolidated.
        pace: When the next pull is due.
        divisor: A weak reference to the function that returns P of the optimizer that steps the parameters,
            for a pull between two of its steps; None before its first step.
    """

    kind: ClassVar[str]

    prior: float
    bound: float
    freezing: Freezing = field(default_factory=Freezing, kw_only=True)
    tasks: int = field(default=0, kw_only=True)
    pace: Pace = field(default_factory=Pace, kw_only=True)
    divisor: Callable[[], Callable[[], Tensor | None] | None] | None = field(
        default=None, kw_only=True, repr=False
    )

    @classmethod
    @abstractmethod
    def claim(cls, module: nn.Module, names: Container[str]) -> list[tuple[str, ...]]:
        """Return the parameters of a module that this class can hold, grouped by state.

        Args:
            module: The network.
            names: The names of the parameters that need a state.
        """

    @classmethod
    @abstractmethod
    def create(cls, parameters: Sequence[Tensor], bound: float, prior: float, freezing: Freezing) -> Self:
        """Return the state of parameters before their first task: nothing frozen, no information."""

    @staticmethod
    @abstractmethod
    def shape_of(parameters: Sequence[Tensor]) -> tuple[int, ...]:
        """Return the shape that a state of such parameters has."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the values, to be compared with :meth:`shape_of`."""

    @property
    @abstractmethod
    def values(self) -> int:
        """The number of values, whether frozen or not."""

    @property
    @abstractmethod
    def bits(self) -> Tensor:
        """uint8: the number of frozen leading bits of each value or coordinate."""

    @property
    @abstractmethod
    def precision(self) -> Tensor:
        """S_t, or F_{0:t} of the paper's rule: float, of each value or coordinate."""

    @property
    @abstractmethod
    def informed(self) -> bool:
        """Whether any task gave information."""

    @abstractmethod
    def observe(self, names: Sequence[str], is_matrix: bool) -> Collector:
        """Return a collector for the next task's gradients.

        Args:
            names: The names of the parameters.
            is_matrix: Whether they belong to a linear map or convolution, whose outputs damping mixes.
        """

    @abstractmethod
    def consolidate(self, parameters: Sequence[Tensor], information: Any) -> Tensor:
        """Add a task's information, anchor the parameters where they are and freeze bits.

        Args:
            parameters: The parameters; moved onto the grid in place where the class has one.
            information: The task's information, as the class's collector returned it.

        Returns:
            The information gain of each value or coordinate, in bits.
        """

    @abstractmethod
    def hold_back(self, step: Step) -> None:
        """Scale, pull and project one step of this state, in place."""

    @classmethod
    def stepper(cls) -> Stepper:
        """Return what holds back the steps of all states of this class."""
        return Stepper()

    @abstractmethod
    def settle(self, parameters: Sequence[Tensor]) -> None:
        """Put parameters into their cells, in place, without a pull."""

    @abstractmethod
    def strain(self, parameters: Sequence[Tensor]) -> Strain:
        """Return the predicted forgetting, and the number of values at their walls."""

    @abstractmethod
    def drifted(self, parameters: Sequence[Tensor]) -> int:
        """Return the number of values whose frozen bits differ from those at the last boundary."""

    def immovable(self) -> Tensor | None:
        """Return a mask of the values with all bits frozen; None where there is no such value."""
        return None

    def locate(self, parameters: Sequence[Tensor]) -> None:  # noqa: B027  most states are complete
        """Complete a restored state from its parameters, with the values of the same checkpoint.

        Raises:
            ValueError: If the parameters are those of another checkpoint.
        """

    @property
    def is_located(self) -> bool:
        """Whether a restored state is complete."""
        return True

    def to(self, device: torch.device) -> None:
        """Move the tensors of the state to a device."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))

    def state_dict(self) -> dict[str, Any]:
        """Return everything that restores the state exactly."""
        state = {name: value for name, value in vars(self).items() if name != "divisor"}
        return {**state, "freezing": asdict(self.freezing), "pace": asdict(self.pace)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Self:
        """Return the state that :meth:`state_dict` saved.

        Raises:
            ValueError: If an entry is damaged.
        """
        state = {**state, "freezing": Freezing(**state["freezing"]), "pace": Pace(**state["pace"])}
        for name in ("prior", "bound"):
            check_number(state, name, torch.finfo(torch.float32).tiny)
        check_number(state, "tasks", 0)
        for name in ("total", "steps", "rate"):
            check_number(vars(state["pace"]), name, 0)
        check_number(vars(state["freezing"]), "max_bits", 1, LARGEST_MAX_BITS)
        return cls(**state)

    def __getstate__(self) -> dict[str, Any]:
        # The divisor belongs to an optimizer of this process.
        return {**vars(self), "divisor": None}
