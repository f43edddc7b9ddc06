"""What is frozen in a whole network: one state per parameter or layer, in one dictionary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_blip.fisher.factors import MATRICES
from lightning_blip.fisher.gradients import SampleGradients
from lightning_blip.frozen.base import (
    Collector,
    Freezing,
    FrozenState,
    Step,
    Stepper,
    Strain,
    TaskInformation,
)
from lightning_blip.frozen.checks import naming
from lightning_blip.frozen.diagonal import DiagonalState
from lightning_blip.frozen.kronecker import KroneckerState
from lightning_blip.frozen.packing import bound

BasisName = Literal["diagonal", "kronecker"]
FanName = Literal["in", "max"]


class Basis(NamedTuple):
    """The classes of states that a basis is made of.

    Attributes:
        states: The classes; each parameter goes to the first class that claims it.
        ignores_correlations: Whether information is measured parameter by parameter, so that the strength of
            the pull has to make up for correlations, see :func:`lightning_blip.strengths.choose_pull`.
    """

    states: tuple[type[FrozenState], ...]
    ignores_correlations: bool = False


#: Every basis, by the name that a user gives.
BASES: dict[BasisName, Basis] = {
    "diagonal": Basis((DiagonalState,), ignores_correlations=True),
    "kronecker": Basis((KroneckerState, DiagonalState)),
}
_KINDS = {kind.kind: kind for basis in BASES.values() for kind in basis.states}


class LayerSize(NamedTuple):
    """The size of the layer that a parameter belongs to.

    Attributes:
        fan: The number of inputs, or the larger side of the layer's matrix; None for a parameter of no linear
            map or convolution.
        is_bias: Whether the parameter is the layer's bias.
    """

    fan: int | None = None
    is_bias: bool = False


@dataclass
class Collectors:
    """The collectors of a whole network, as one observer of :func:`diagonal_fisher`.

    Attributes:
        collectors: By the name of the state.
        names: The parameters of each state.
    """

    collectors: Mapping[str, Collector]
    names: Mapping[str, tuple[str, ...]]
    samples: int = 0

    def __post_init__(self) -> None:
        self._of = {
            parameter: collector
            for name, collector in self.collectors.items()
            for parameter in self.names[name]
        }

    def see(self, name: str, gradients: SampleGradients) -> None:
        """Hand the gradients of a parameter to the collector of its state."""
        self._of[name].see(name, gradients)

    def end_batch(self, size: int) -> None:
        """Count the samples of a batch."""
        self.samples += size

    def finish(self) -> list[Tensor]:
        """Return the means of all collectors, to be averaged over processes in place."""
        return [mean for one in self.collectors.values() for mean in one.finish(self.samples)]

    def information(self, fishers: Mapping[str, Tensor]) -> dict[str, TaskInformation]:
        """Return the task's information by the name of the state."""
        return {name: one.information(fishers) for name, one in self.collectors.items()}


@dataclass
class FrozenNetwork:
    """The frozen states of a network, by name; made of tensors and modules, without a Trainer.

    Attributes:
        basis: The name of the basis, a key of :data:`BASES`.
        fan: Which side of a layer its bound and prior depend on, see :class:`lightning_blip.BLIP`.
        freezing: How information becomes frozen bits.
        states: Every state, by the name of its first parameter.
        names: The names of all parameters of each state, by the same name.
    """

    basis: BasisName = "diagonal"
    fan: FanName = "in"
    freezing: Freezing = field(default_factory=Freezing)
    states: dict[str, FrozenState] = field(default_factory=dict)
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def attach(self, module: nn.Module, tracked: Mapping[str, Tensor]) -> None:
        """Make a state for every tracked parameter that has none, and move all states to its device.

        Args:
            module: The network, with the weights that the states were saved with.
            tracked: Parameters by name.

        Raises:
            ValueError: If the network is not the one that the states belong to.
        """
        own = dict(module.named_parameters())
        self._check_fits(own)
        known = {parameter for names in self.names.values() for parameter in names}
        left = {name: theta for name, theta in tracked.items() if name not in known}
        sizes = layer_sizes(module, self.fan)
        for kind in BASES[self.basis].states:
            for names in kind.claim(module, left):
                parameters = [left.pop(name) for name in names]
                size = sizes.get(names[0], LayerSize())
                largest = parameters[0] if len(names) == 1 else _joined(parameters)
                limit = bound(largest, size.fan, is_bias=size.is_bias)
                self.states[names[0]] = kind.create(parameters, limit, 1.0, self.freezing)
                self.names[names[0]] = names
        for name, state in self.states.items():
            state.to(own[name].device)
            with naming(name):  # Lightning restores the module before its callbacks start
                state.locate([own[parameter] for parameter in self.names[name]])

    def state_of(self, parameter: str) -> FrozenState:
        """Return the state that holds a parameter, alone or together with others.

        Raises:
            KeyError: If no state holds it.
        """
        return next(self.states[name] for name, names in self.names.items() if parameter in names)

    def set_prior(self, module: nn.Module, prior: float) -> None:
        """Set S_0 of every state that has no information yet: the prior times the layer's fan."""
        units = self.units(module)
        for name, state in self.states.items():
            if not state.tasks or not state.informed:
                state.prior = prior * units[name]

    def units(self, module: nn.Module) -> dict[str, int]:
        """Return what the prior of each state is multiplied by: the fan of its layer, else 1."""
        sizes = layer_sizes(module, self.fan)
        return {name: sizes.get(name, LayerSize()).fan or 1 for name in self.states}

    def observe(self, module: nn.Module) -> Collectors:
        """Return collectors for the next task's gradients.

        A state of which not all parameters are trained any more is left out: it stays as it is.
        """
        own, sizes = dict(module.named_parameters()), layer_sizes(module)
        trained = [name for name, names in self.names.items() if all(own[one].requires_grad for one in names)]
        collectors = {name: self.states[name].observe(self.names[name], name in sizes) for name in trained}
        return Collectors(collectors, self.names)

    def consolidate(self, module: nn.Module, information: Mapping[str, TaskInformation]) -> dict[str, Tensor]:
        """Add a task's information, and freeze the bits that it fixes.

        Args:
            module: The network; its parameters are moved onto the grid in place.
            information: By the name of the state; states without an entry stay as they are.

        Returns:
            The information gain of each state's values, in bits.
        """
        return {
            name: state.consolidate(parameters, information[name])
            for name, state, parameters in self._with_parameters(module)
            if name in information
        }

    def settle(self, module: nn.Module, pull: float) -> None:
        """Apply the pull that is still due, and put every parameter into its cell.

        Args:
            module: The network.
            pull: λ.
        """
        steps: dict[type[FrozenState], list[Step]] = {}
        for _, state, parameters in self._with_parameters(module):
            rate = state.pace.collect()
            divisor = None if state.divisor is None else state.divisor()
            if state.tasks and divisor is not None:  # the optimizer is still there
                P = divisor() if pull * rate else None
                steps.setdefault(type(state), []).append(Step(parameters, state, pull, rate, P, seldom=True))
        hold_back_each(steps, {kind: kind.stepper() for kind in steps}, scale=0.0)
        for _, state, parameters in self._with_parameters(module):
            state.settle(parameters)

    def bits(self) -> dict[str, Tensor]:
        """Return the frozen bits of each state: uint8."""
        return {name: state.bits for name, state in self.states.items()}

    def precision(self) -> dict[str, Tensor]:
        """Return S_t, or the paper's F_{0:t}, of each state."""
        return {name: state.precision for name, state in self.states.items()}

    @property
    def just_pulled(self) -> bool:
        """Whether the last step was one that pulls."""
        return all(state.pace.steps == 0 for state in self.states.values())

    @property
    def values(self) -> int:
        """The number of parameters that have a state."""
        return sum(state.values for state in self.states.values())

    @property
    def used_capacity(self) -> float:
        """Σ bits / Σ N."""
        frozen = sum(int(bits.sum()) for bits in self.bits().values())
        return frozen / max(self.values * self.freezing.max_bits, 1)

    def strain(self, module: nn.Module) -> Strain:
        """Return the predicted forgetting of the whole network, and the number of values at their walls."""
        strains = [state.strain(parameters) for _, state, parameters in self._with_parameters(module)]
        return Strain(sum(one.forgetting for one in strains), sum(one.at_walls for one in strains))

    def drifted(self, module: nn.Module) -> int:
        """Return the number of values whose frozen bits differ from those at the last boundary."""
        return sum(state.drifted(parameters) for _, state, parameters in self._with_parameters(module))

    def by_parameters(self, module: nn.Module) -> dict[tuple[Tensor, ...], FrozenState]:
        """Return the states by their parameters, as an optimizer needs them."""
        own = dict(module.named_parameters())
        return {tuple(own[one] for one in names): self.states[name] for name, names in self.names.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return what was learned, by the name of the state."""
        return {
            name: {"kind": state.kind, "names": list(self.names[name]), "state": state.state_dict()}
            for name, state in self.states.items()
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what was saved.

        Raises:
            ValueError: If it is damaged; the error names the parameter.
        """
        self.states, self.names = {}, {}
        for name, saved in state_dict.items():
            with naming(name):
                self.states[name] = _KINDS[saved["kind"]].from_state_dict(saved["state"])
            self.names[name] = tuple(saved["names"])

    def _with_parameters(self, module: nn.Module) -> Iterator[tuple[str, FrozenState, list[Tensor]]]:
        own = dict(module.named_parameters())
        for name, state in self.states.items():
            yield name, state, [own[parameter].detach() for parameter in self.names[name]]

    def _check_fits(self, own: Mapping[str, Tensor]) -> None:
        """Raise an error for another network, which names the first difference."""
        advice = "use a new BLIP() for another network"
        for name, names in self.names.items():
            for parameter in names:
                if parameter not in own:
                    raise ValueError(
                        f"BLIP has learned about {parameter!r}, which the module does not have: {advice}"
                    )
            state = self.states[name]
            shape = state.shape_of([own[parameter] for parameter in names])
            if shape != state.shape:
                raise ValueError(
                    f"{name!r} has shape {shape} here, and {state.shape} in what BLIP has learned: {advice}"
                )


def hold_back_each(
    steps: Mapping[type[FrozenState], list[Step]], steppers: Mapping[type[FrozenState], Stepper], scale: float
) -> None:
    """Hold back the steps of every class of states by its stepper."""
    for kind, of_kind in steps.items():
        steppers[kind](of_kind, scale)


def layer_sizes(module: nn.Module, fan: FanName = "in") -> dict[str, LayerSize]:
    """Return the size of the layer of every parameter of a linear map or convolution, by its name.

    Args:
        module: The network.
        fan: ``"in"`` for the number of inputs, ``"max"`` for the larger side of the matrix.

    Example:
        >>> layer_sizes(nn.Linear(4, 8), fan="max")
        {'weight': LayerSize(fan=8, is_bias=False), 'bias': LayerSize(fan=8, is_bias=True)}
    """
    sizes = {}
    for prefix, part in module.named_modules():
        if isinstance(part, MATRICES):
            outputs, inputs = part.weight.flatten(1).shape
            size = max(inputs, outputs) if fan == "max" else inputs
            for name in ("weight", "bias"):
                sizes[f"{prefix}.{name}" if prefix else name] = LayerSize(size, name == "bias")
    return sizes


def _joined(parameters: list[Tensor]) -> Tensor:
    """Return all values of several parameters as one vector."""
    return torch.cat([theta.detach().flatten() for theta in parameters])
