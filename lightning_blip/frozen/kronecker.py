"""The Kronecker basis: the frozen state of one layer, in the eigenbasis of its Fisher information."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_blip.fisher.factors import Factors, matrix_layers
from lightning_blip.fisher.gradients import Products, SampleGradients
from lightning_blip.frozen.base import Collector, Freezing, FrozenState, Step, Strain, TaskInformation
from lightning_blip.frozen.checks import check_number, check_tensor
from lightning_blip.frozen.eigenbasis import add_factor, diagonal_in
from lightning_blip.frozen.gains import exact_bits, information_gain
from lightning_blip.frozen.packing import LARGEST_MAX_BITS


@dataclass(frozen=True)
class KroneckerInformation(TaskInformation):
    """The Fisher information of a layer as the product of two factors, F ≈ G ⊗ A.

    Attributes:
        factors: A of the inputs and G of the outputs.
    """

    factors: Factors

    def damped(self, damping: float) -> KroneckerInformation:
        """Return the information with G + δ·mean(diag G)·I in place of G."""
        A, G = self.factors.A, self.factors.G
        even = torch.eye(len(G), dtype=G.dtype, device=G.device)
        return KroneckerInformation(Factors(A, G + damping * G.diagonal().mean() * even))

    def coordinates(self) -> Tensor:
        """Return the eigenvalues of G ⊗ A."""
        return torch.outer(torch.linalg.eigvalsh(self.factors.G), torch.linalg.eigvalsh(self.factors.A))


class _FactorSums(Collector):
    """Adds up the factors of one layer, whose weight and bias have the given names.

    Source:
        Martens and Grosse, Optimizing Neural Networks with Kronecker-factored Approximate Curvature, ICML
        2015; for convolutions Grosse and Martens, A Kronecker-factored approximate Fisher matrix for
        convolution layers, ICML 2016.
    """

    def __init__(self, names: Sequence[str], empty: Tensor, shape: Sequence[int]) -> None:
        self._names = names
        self._outputs, self._inputs = shape
        self._factors = Factors(
            empty.new_zeros(self._inputs, self._inputs), empty.new_zeros(self._outputs, self._outputs)
        )
        self._has_rule = False

    def see(self, parameter: str, gradients: SampleGradients) -> None:
        if parameter == self._names[0] and isinstance(gradients, Products):
            self._has_rule = True
            gradients.add_factors(self._factors.A, self._factors.G)

    def finish(self, samples: int) -> list[Tensor]:
        return [self._factors.A.div_(samples), self._factors.G.div_(samples)]

    def information(self, fishers: Mapping[str, Tensor]) -> KroneckerInformation:
        weight, *bias = (fishers[name] for name in self._names)
        if not self._has_rule and weight.any():
            raise ValueError(
                f"The layer of {self._names[0]!r} has no Kronecker factors, because its weight is used "
                f"outside of its own operation: leave it out with exclude={self._names[0]!r}, or take "
                "basis='diagonal'"
            )
        if not self._has_rule:
            return KroneckerInformation(self._factors)
        trace = weight.sum() + (bias[0].sum() if bias else 0.0)
        return KroneckerInformation(self._factors.calibrated(trace))


@dataclass(eq=False)
class KroneckerState(FrozenState):
    """The frozen state of a layer's matrix θ (out, in); a bias is one more column.

    With F ≈ G ⊗ A summed over tasks, A = U_A·diag(α)·U_Aᵀ and G = U_G·diag(γ)·U_Gᵀ, the coordinates
    ω = U_Gᵀ·(θ − θ*)·U_A have the precisions S = S_0 + γ·αᵀ/t. Each coordinate has ½·log2(S/S_0) frozen bits,
    rounded. They limit it to ±B·2^−bits: its cell, around 0 because the basis turns at each boundary. A
    coordinate without frozen bits is free. Bits and precisions follow from the eigenvalues and take no
    memory.

    Beside the anchor the state holds in² + out² numbers for any number of tasks; with a rank, at most
    rank·(in + out). The dropped directions share their mean eigenvalue and have no cells.

    Attributes:
        prior: S_0.
        bound: B.
        anchor: θ*, the matrix right after the last boundary.
        input_basis: U_A, (in, k).
        input_values: α, (k,), the largest first.
        output_basis: U_G, (out, l).
        output_values: γ, (l,), the largest first.
        input_rest: ᾱ, the mean eigenvalue of the dropped input directions.
        output_rest: γ̄, the mean eigenvalue of the dropped output directions.

    Example:
        >>> theta = torch.tensor([[0.5, 0.0]])
        >>> state = KroneckerState.of(theta, bound=1.0, prior=1.0)
        >>> factors = Factors(torch.tensor([[15.0, 0.0], [0.0, 0.0]]), torch.eye(1))
        >>> state.consolidate([theta], KroneckerInformation(factors))
        tensor([[2., 0.]])
        >>> state.held_back(theta + 0.5, strength=0.0)
        tensor([[0.7500, 0.5000]])

    Source:
        The basis is that of Ritter, Botev, Barber, Online Structured Laplace Approximations for Overcoming
        Catastrophic Forgetting, NeurIPS 2018.
    """

    kind: ClassVar[str] = "kronecker"

    anchor: Tensor
    input_basis: Tensor
    input_values: Tensor
    output_basis: Tensor
    output_values: Tensor
    input_rest: float = 0.0
    output_rest: float = 0.0

    @classmethod
    def claim(cls, module: nn.Module, names: Container[str]) -> list[tuple[str, ...]]:
        """Return the weights of linear maps and convolutions, each with its bias if it has one."""
        layers = matrix_layers(module, names)
        return [(weight,) if bias is None else (weight, bias) for weight, bias in layers.items()]

    @classmethod
    def create(cls, parameters: Sequence[Tensor], bound: float, prior: float, freezing: Freezing) -> Self:
        """Return the state before the first task: no direction has any information."""
        theta = as_matrix(parameters)
        out, inputs = theta.shape
        no_values = theta.new_zeros(0)
        bases = theta.new_zeros(inputs, 0), theta.new_zeros(out, 0)
        return cls(
            prior, bound, theta.clone(), bases[0], no_values, bases[1], no_values.clone(), freezing=freezing
        )

    @classmethod
    def of(
        cls,
        theta: Tensor,
        bound: float,
        prior: float,
        max_bits: int = LARGEST_MAX_BITS,
        rank: int | None = None,
    ) -> Self:
        """Return the state of one matrix before the first task."""
        return cls.create([theta], bound, prior, Freezing(max_bits, rank=rank))

    @staticmethod
    def shape_of(parameters: Sequence[Tensor]) -> tuple[int, ...]:
        """Return the shape of the matrix of a weight and its bias."""
        weight, *bias = parameters
        return len(weight), weight[0].numel() + len(bias)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix."""
        return tuple(self.anchor.shape)

    @property
    def values(self) -> int:
        """The number of coordinates."""
        return self.anchor.numel()

    @property
    def information(self) -> Tensor:
        """S − S_0 of each coordinate, (l, k)."""
        return torch.outer(self.output_values, self.input_values) / max(self.tasks, 1)

    @property
    def informed(self) -> bool:
        """Whether any task gave information."""
        return bool(self.information.any())

    @property
    def precision(self) -> Tensor:
        """S of each coordinate, (l, k)."""
        return self.prior + self.information

    @property
    def bits(self) -> Tensor:
        """uint8: the number of frozen leading bits of each coordinate, (l, k)."""
        return exact_bits(self.precision, self.prior, self.freezing.max_bits)

    @property
    def width(self) -> Tensor:
        """The largest |ω| that each cell allows, (l, k); infinite where no bit is frozen."""
        bits = self.bits
        return (self.bound * torch.exp2(-bits.to(self.anchor.dtype))).masked_fill(bits == 0, math.inf)

    def observe(self, names: Sequence[str], is_matrix: bool) -> Collector:
        """Return a collector of the layer's factors."""
        empty = self.anchor.new_zeros((), dtype=torch.promote_types(self.anchor.dtype, torch.float32))
        return _FactorSums(names, empty, self.shape)

    def consolidate(self, parameters: Sequence[Tensor], information: KroneckerInformation) -> Tensor:
        """Add a task's factors, and anchor the matrix where it is.

        Args:
            parameters: The weight and, if there is one, the bias.
            information: The task's information.

        Returns:
            The information gain of each coordinate of the new basis, in bits; the earlier information is
            turned into the new basis for the comparison.
        """
        of_input = (self.input_basis, self.input_values, self.input_rest)
        of_output = (self.output_basis, self.output_values, self.output_rest)
        A, G, rank = information.factors.A, information.factors.G, self.freezing.rank
        self.input_basis, self.input_values, self.input_rest = add_factor(*of_input, A, rank)
        self.output_basis, self.output_values, self.output_rest = add_factor(*of_output, G, rank)
        before = torch.outer(
            diagonal_in(*of_output, self.output_basis), diagonal_in(*of_input, self.input_basis)
        ) / max(self.tasks, 1)
        self.tasks += 1
        self.pace.total = 0
        self.anchor = as_matrix(parameters).clone()
        return information_gain(self.precision, self.prior + before)

    def hold_back(self, step: Step) -> None:
        """Pull a layer and keep it in its cells, in place, where a pull is due.

        P is the root mean square over the weight.
        """
        if not (step.rate and self.tasks):
            return
        mean = 1.0 if step.divisor is None else float(step.divisor.square().mean().sqrt())
        self._hold(step.parameters, step.strength / max(mean, 1e-30))

    def settle(self, parameters: Sequence[Tensor]) -> None:
        """Put a layer into its cells."""
        if self.tasks:
            self._hold(parameters, strength=0.0)

    def _hold(self, parameters: Sequence[Tensor], strength: float) -> None:
        held = self.held_back(as_matrix(parameters), strength)
        weight, *bias = (theta.detach() for theta in parameters)
        weight.copy_(held[:, : weight[0].numel()].view_as(weight))
        for theta in bias:
            theta.copy_(held[:, -1])

    def held_back(self, theta: Tensor, strength: float) -> Tensor:
        """Return a matrix pulled towards the anchor and kept in its cells.

        Args:
            theta: The matrix.
            strength: η·λ: ω becomes ω/(1 + ηλ(S − S_0)).

        Returns:
            A new matrix.
        """
        delta = theta - self.anchor
        if not self._is_whole:
            return theta - self._removed_with_rest(delta, strength)
        for block in self._blocks(strength):
            U_G, U_A = block.output_basis, block.input_basis
            removed = block._removed(torch.linalg.multi_dot([U_G.T, delta, U_A]), strength)
            theta = theta - torch.linalg.multi_dot([U_G, removed, U_A.T])
        return theta

    def _blocks(self, strength: float) -> Iterator[KroneckerState]:
        """Yield the coordinates with frozen bits, and those that the pull moves by more than rounding.

        The eigenvalues fall, so each row has fewer such coordinates than the row above. Two blocks cover
        them: all columns of the first rows, and the first columns of the other rows. In large layers that is
        the smaller part of the matrix, and of the products.
        """
        noticed = torch.finfo(self.anchor.dtype).eps / 2 / max(strength, 1e-30)
        # Half of the information that freezes a bit, so that rounding hides none.
        least = min(noticed, self.prior / 2) * max(self.tasks, 1)
        gamma, alpha = self.output_values.cpu(), self.input_values.cpu()
        columns = torch.cat([torch.searchsorted(-alpha, -least / gamma), torch.zeros(1, dtype=torch.int64)])
        rows = int((columns + torch.arange(len(columns))).argmin())
        if rows:
            yield self._block(slice(rows), slice(int(columns[0])))
        yield self._block(slice(rows, None), slice(int(columns[rows])))

    def _block(self, rows: slice, columns: slice) -> KroneckerState:
        return replace(
            self,
            output_basis=self.output_basis[:, rows],
            output_values=self.output_values[rows],
            input_basis=self.input_basis[:, columns],
            input_values=self.input_values[columns],
        )

    def _removed(self, omega: Tensor, strength: float) -> Tensor:
        """Return what pull and cells take from the coordinates."""
        width = self.width
        return omega - (omega / (1 + strength * self.information)).clamp(-width, width)

    def _removed_with_rest(self, delta: Tensor, strength: float) -> Tensor:
        """Return what pull and cells take from θ − θ*, where dropped directions share an eigenvalue."""
        U_G, U_A = self.output_basis, self.input_basis
        along_outputs = U_G.T @ delta
        omega = along_outputs @ U_A
        # s/(1 + s) of the part along kept outputs alone, along kept inputs alone, and along neither.
        outputs, inputs, rest = (1 - 1 / (1 + strength * one) for one in self._information_of_rest)
        inside = (self._removed(omega, strength) - rest * omega) @ U_A.T
        inside += (outputs - rest) * (along_outputs - omega @ U_A.T)
        outside = (inputs - rest) * (delta @ U_A - U_G @ omega) @ U_A.T
        return U_G @ inside + outside + rest * delta

    def strain(self, parameters: Sequence[Tensor]) -> Strain:
        """Return ½·Σ (S − S_0)·ω²/t, and the number of coordinates at the walls of their cells."""
        delta = as_matrix(parameters) - self.anchor
        along_outputs = self.output_basis.T @ delta
        omega = along_outputs @ self.input_basis
        cost = (self.information * omega.square()).sum()
        if not self._is_whole:
            along_inputs = delta @ self.input_basis
            outputs, inputs, rest = self._information_of_rest
            of_outputs = along_outputs.square().sum(1) - omega.square().sum(1)
            of_inputs = along_inputs.square().sum(0) - omega.square().sum(0)
            of_rest = delta.square().sum() - omega.square().sum() - of_outputs.sum() - of_inputs.sum()
            cost += (outputs[:, 0] * of_outputs).sum() + (inputs * of_inputs).sum() + rest * of_rest
        at_walls = omega.abs() >= self.width
        return Strain(0.5 * float(cost) / max(self.tasks, 1), int(at_walls.sum()))

    def drifted(self, parameters: Sequence[Tensor]) -> int:
        """Return the number of coordinates outside their cells, by more than a rounding error.

        Cells are checked at each pull: coordinates that left theirs since the last pull count, too.
        """
        delta = as_matrix(parameters) - self.anchor
        omega = torch.linalg.multi_dot([self.output_basis.T, delta, self.input_basis])
        rounding = self.bound * torch.finfo(omega.dtype).eps * sum(self.shape)
        return int((omega.abs() > self.width + rounding).sum())

    @property
    def _is_whole(self) -> bool:
        """Whether all directions are kept."""
        return self.input_rest == self.output_rest == 0.0

    @property
    def _information_of_rest(self) -> tuple[Tensor, Tensor, float]:
        """S − S_0 along kept outputs and no kept input (l, 1), the reverse (k,), and along neither."""
        t = max(self.tasks, 1)
        return (
            self.output_values[:, None] * (self.input_rest / t),
            self.input_values * (self.output_rest / t),
            self.output_rest * self.input_rest / t,
        )

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Self:
        """Return the state that :meth:`state_dict` saved.

        Raises:
            ValueError: If an entry is damaged.
        """
        floats = [torch.float32, torch.float64]
        out, inputs = state["anchor"].shape
        check_tensor(state, "anchor", floats, (out, inputs))
        for side, size in (("input", inputs), ("output", out)):
            kept = len(state[f"{side}_values"])
            check_tensor(state, f"{side}_values", floats, (kept,))
            check_tensor(state, f"{side}_basis", floats, (size, kept))
            check_number(state, f"{side}_rest", 0)
        return super().from_state_dict(state)


def as_matrix(parameters: Sequence[Tensor]) -> Tensor:
    """Return a layer's weight and, if there is one, its bias as one matrix, (out, in) or (out, in + 1).

    Example:
        >>> as_matrix([torch.ones(2, 3), torch.zeros(2)])
        tensor([[1., 1., 1., 0.],
                [1., 1., 1., 0.]])
    """
    weight, *bias = (theta.detach() for theta in parameters)
    return torch.cat([weight.flatten(1), *(theta.unsqueeze(1) for theta in bias)], dim=1)
