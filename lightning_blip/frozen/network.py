"""What is frozen in a whole network: a state for each parameter, or for each layer in its Kronecker basis."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from lightning_blip.fisher.factors import MATRICES, Factors, matrix_layers
from lightning_blip.frozen.diagonal import Cell, FrozenBits, bound
from lightning_blip.frozen.information import Rule, consolidate, rule_precision
from lightning_blip.frozen.kronecker import KroneckerBits, as_matrix
from lightning_blip.strengths import Measured

Basis = Literal["diagonal", "kronecker"]
Fan = Literal["in", "max"]
T = TypeVar("T", bound=Tensor)


@dataclass
class FrozenNetwork:
    """The frozen states of a network, by name; tensors and modules alone know of it, no Trainer.

    Attributes:
        max_bits: N.
        rule: ``"exact"`` or ``"paper"``.
        cell: ``"strict"`` or ``"paper"``.
        basis: ``"diagonal"``, or ``"kronecker"`` for those layers that are matrices.
        rank: See :class:`KroneckerBits`.
        fan: Which side of a layer tells its bound and prior, see :class:`BLIP`.
        parameters: The state of each parameter, by its name.
        layers: The state of each layer in the Kronecker basis, by the name of its weight.
        biases: The name of its bias, by that of its weight; None if there is none.
    """

    max_bits: int
    rule: Rule
    cell: Cell
    basis: Basis
    rank: int | None = None
    fan: Fan = "in"
    parameters: dict[str, FrozenBits] = field(default_factory=dict)
    layers: dict[str, KroneckerBits] = field(default_factory=dict)
    biases: dict[str, str | None] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Of all parameters that have a state, alone or in their layer."""
        biases = [bias for bias in self.biases.values() if bias is not None]
        return [*self.parameters, *self.layers, *biases]

    @property
    def states(self) -> dict[str, FrozenBits | KroneckerBits]:
        """Those of parameters and layers together."""
        return {**self.parameters, **self.layers}

    def attach(self, module: nn.Module, tracked: Mapping[str, Tensor]) -> None:
        """Has a state, on the right device, for every tracked parameter.

        Args:
            module: The network, its weights those that the states were saved with.
            tracked: Parameters by name.

        Raises:
            ValueError: If the network is another.
        """
        own = dict(module.named_parameters())
        self._check_fits(own)
        known = set(self.names)
        new = {name: theta for name, theta in tracked.items() if name not in known}
        fans = _fans(module, self.fan)
        if self.basis == "kronecker":
            for weight, bias in matrix_layers(module, new).items():
                theta = as_matrix([new.pop(name) for name in (weight, bias) if name is not None])
                limit = bound(theta, fans[weight][0])
                self.layers[weight] = KroneckerBits.of(theta, limit, 1.0, self.max_bits, self.rank)
                self.biases[weight] = bias
        for name, theta in new.items():
            fan, is_bias = fans.get(name, (None, False))
            limit = bound(theta, fan, bias=is_bias)
            self.parameters[name] = FrozenBits.of(theta, limit, 1.0, self.max_bits, self.cell)
        for name, frozen in self.parameters.items():
            if frozen.packed.device != own[name].device:
                self.parameters[name] = frozen.to(own[name].device)
            with _naming(name):  # Lightning restores the module before it asks callbacks to start
                self.parameters[name].locate(own[name])
        for name, layer in self.layers.items():
            if layer.anchor.device != own[name].device:
                self.layers[name] = layer.to(own[name].device)

    def set_prior(self, module: nn.Module, prior: float) -> None:
        """Gives every state that has learned nothing yet its S_0, the prior times the layer's fan."""
        fans = _fans(module, self.fan)
        for name, state in self.states.items():
            if not state.tasks or not state.information.any():
                state.prior = prior * (fans.get(name, (None, False))[0] or 1)

    def measured(
        self, module: nn.Module, fishers: Mapping[str, Tensor], factors: Mapping[str, Factors]
    ) -> list[Measured]:
        """What a first task told, to choose the prior from."""
        fans = _fans(module, self.fan)
        units = {name: float(fans.get(name, (None, False))[0] or 1) for name in self.states}
        alone = [
            Measured(fishers[name], units[name], self.parameters[name].bound)
            for name in self.parameters
            if name in fishers
        ]
        together = [
            Measured(
                torch.outer(torch.linalg.eigvalsh(factors[name].G), torch.linalg.eigvalsh(factors[name].A)),
                units[name],
                self.layers[name].bound,
            )
            for name in self.layers
            if name in factors
        ]
        return alone + together

    def consolidate(
        self,
        module: nn.Module,
        fishers: Mapping[str, Tensor],
        factors: Mapping[str, Factors],
    ) -> dict[str, Tensor]:
        """Adds what a task told, and freezes the bits that this fixes.

        Args:
            module: The network; what is frozen is moved onto the grid, in place.
            fishers: F_t of the parameters that are trained, by name.
            factors: Those of their layers in the Kronecker basis, by the name of the weight.

        Returns:
            The information gain of each parameter or layer, in bits.
        """
        own = dict(module.named_parameters())
        gains = {}
        for name, frozen in self.parameters.items():
            if name in fishers:
                gains[name] = consolidate(own[name].data, frozen, fishers[name], self.rule)
        for name, layer in self.layers.items():
            if name in factors:
                gains[name] = layer.consolidate(as_matrix(self._of_layer(own, name)), factors[name])
        return gains

    def settle(self, module: nn.Module) -> None:
        """Puts everything into its cell; whatever pull was due is counted as done."""
        own = dict(module.named_parameters())
        for name, frozen in self.parameters.items():
            frozen.collected()
            theta = own[name].data
            theta.clamp_(*frozen.limits(theta.dtype))
        for name, layer in self.layers.items():
            layer.collected()
            if layer.tasks:
                layer.hold_back([theta.data for theta in self._of_layer(own, name)], pull=0.0)

    def bits(self) -> dict[str, Tensor]:
        """uint8: of each parameter, or of each coordinate of a layer."""
        return {name: state.bits for name, state in self.states.items()}

    def precision(self) -> dict[str, Tensor]:
        """S_t, or the paper's F_{0:t}: float32, of each parameter or coordinate."""
        alone = {name: rule_precision(frozen, self.rule) for name, frozen in self.parameters.items()}
        return {**alone, **{name: layer.precision for name, layer in self.layers.items()}}

    @property
    def just_pulled(self) -> bool:
        """Whether the last step was one that pulls."""
        return all(state.steps == 0 for state in self.states.values())

    @property
    def values(self) -> int:
        """How many parameters there are."""
        return sum(frozen.packed.numel() for frozen in self.parameters.values()) + sum(
            layer.anchor.numel() for layer in self.layers.values()
        )

    @property
    def used_capacity(self) -> float:
        """Σ bits / Σ N."""
        return sum(int(bits.sum()) for bits in self.bits().values()) / max(self.values * self.max_bits, 1)

    def strain(self, module: nn.Module) -> tuple[float, int]:
        """What a network has forgotten since the last boundary, and how much of it is held back.

        Args:
            module: The network.

        Returns:
            ½·Σ (S − S_0)·(θ − θ*)²/t over the whole network, in nats a sample; and how many parameters or
            coordinates lie at, or beyond, the walls of cells with frozen bits.
        """
        own = dict(module.named_parameters())
        forgotten, count = 0.0, 0
        for name, frozen in self.parameters.items():
            theta = own[name].detach()
            low, high = frozen.limits(theta.dtype)
            count += int(((frozen.bits > 0) & ((theta <= low) | (theta >= high))).sum())
            forgotten += float(frozen.predicted_forgetting(theta))
        for name, layer in self.layers.items():
            cost, at_walls = layer.strain(as_matrix(self._of_layer(own, name)))
            forgotten += cost
            count += at_walls
        return forgotten, count

    def drifted(self, module: nn.Module) -> int:
        """How many parameters have other frozen bits than at the last boundary."""
        own = dict(module.named_parameters())
        return sum(
            int((frozen.frozen_code(own[name]) != frozen.frozen_code(frozen.anchor(own[name].dtype))).sum())
            for name, frozen in self.parameters.items()
        )

    def by_parameter(self, module: nn.Module) -> dict[Tensor, FrozenBits]:
        """The states as an optimizer needs them."""
        own = dict(module.named_parameters())
        return {own[name]: frozen for name, frozen in self.parameters.items()}

    def by_layer(self, module: nn.Module) -> dict[tuple[Tensor, ...], KroneckerBits]:
        """Those of layers, by weight and bias."""
        own = dict(module.named_parameters())
        return {tuple(self._of_layer(own, name)): layer for name, layer in self.layers.items()}

    def state_dict(self) -> dict[str, Any]:
        """What was learned."""
        return {
            "parameters": {name: frozen.state_dict() for name, frozen in self.parameters.items()},
            "layers": {name: layer.state_dict() for name, layer in self.layers.items()},
            "biases": self.biases,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from what was saved.

        Raises:
            ValueError: If it is damaged; it names the parameter.
        """
        self.parameters, self.layers = {}, {}
        for name, state in state_dict["parameters"].items():
            with _naming(name):
                self.parameters[name] = FrozenBits.from_state_dict(state)
        for name, state in state_dict["layers"].items():
            with _naming(name):
                self.layers[name] = KroneckerBits.from_state_dict(state)
        self.biases = {name: state_dict["biases"][name] for name in self.layers}

    def _check_fits(self, own: Mapping[str, Tensor]) -> None:
        """Refuses another network, and names the first difference."""
        advice = "use a new BLIP() for another network"
        for name in self.names:
            if name not in own:
                raise ValueError(f"BLIP has learned about {name!r}, which the module does not have: {advice}")
        saved = {name: tuple(state.packed.shape) for name, state in self.parameters.items()}
        saved |= {name: tuple(layer.anchor.shape) for name, layer in self.layers.items()}
        for name, theta in own.items():
            shape = tuple(theta.shape)
            if name in self.layers:
                shape = (len(theta), theta[0].numel() + (self.biases[name] is not None))
            if shape != saved.get(name, shape):
                raise ValueError(
                    f"{name!r} has shape {shape} here, and {saved[name]} in what BLIP has learned: {advice}"
                )

    def _of_layer(self, own: Mapping[str, T], name: str) -> list[T]:
        bias = self.biases[name]
        return [own[name]] if bias is None else [own[name], own[bias]]


@contextmanager
def _naming(parameter: str) -> Iterator[None]:
    """Has an error say which parameter it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"Parameter {parameter!r}: {error}") from error


def damped(
    module: nn.Module,
    fishers: Mapping[str, Tensor],
    factors: Mapping[str, Factors],
    damping: float,
) -> tuple[dict[str, Tensor], dict[str, Factors]]:
    """Information of which a part counts for all of a layer's outputs alike.

    Args:
        module: The network.
        fishers: F_t by parameter name.
        factors: Of layers, by the name of the weight.
        damping: δ: F_ij becomes F_ij + δ·mean_i F_ij, and G becomes G + δ·mean(diag G)·I.

    Returns:
        Both, damped; parameters that belong to no linear map or convolution as they are.
    """
    matrices = _fans(module)
    spread = {
        name: fisher + damping * fisher.mean(0, keepdim=True) if name in matrices else fisher
        for name, fisher in fishers.items()
    }
    widened = {}
    for name, factor in factors.items():
        even = torch.eye(len(factor.G), dtype=factor.G.dtype, device=factor.G.device)
        widened[name] = Factors(factor.A, factor.G + damping * factor.G.diagonal().mean() * even)
    return spread, widened


def _fans(module: nn.Module, fan: Fan = "in") -> dict[str, tuple[int, bool]]:
    """The layer's fan, and whether it is the bias, of every parameter of a Linear or Conv layer, by name."""
    fans = {}
    for prefix, part in module.named_modules():
        if isinstance(part, MATRICES):
            outputs, inputs = part.weight.flatten(1).shape
            for name in ("weight", "bias"):
                size = max(inputs, outputs) if fan == "max" else inputs
                fans[f"{prefix}.{name}" if prefix else name] = (size, name == "bias")
    return fans
