"""What is frozen in one layer, in the Kronecker eigenbasis of its Fisher information."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_blip.bits import LARGEST_MAX_BITS, Paced, exact_bits
from lightning_blip.fisher.kronecker import Factors
from lightning_blip.information import information_gain


@dataclass
class KroneckerBits(Paced):
    """The frozen state of a layer's matrix θ (out, in), a bias being one more column.

    With F ≈ G ⊗ A summed over tasks, A = U_A·diag(α)·U_Aᵀ and G = U_G·diag(γ)·U_Gᵀ, the coordinates
    ω = U_Gᵀ·(θ − θ*)·U_A have the precisions S = S_0 + γ·αᵀ/t. As θ in the diagonal basis, each coordinate
    has ½·log2(S/S_0) frozen bits, rounded, which leave it ±B·2^−bits: its cell, around 0, since the basis
    turns at each boundary. Bits and precisions follow from the eigenvalues: they take no memory.

    Beside the anchor it holds in² + out² numbers, however many tasks; with a ``rank``, at most
    rank·(in + out): the directions that matter least are then left free.

    Attributes:
        anchor: θ*, the matrix right after the last boundary.
        input_basis: U_A, (in, k).
        input_values: α, (k,).
        output_basis: U_G, (out, l).
        output_values: γ, (l,).
        prior: S_0.
        bound: B.
        max_bits: N.
        rank: The largest k and l; None for all.
        tasks: t, how many were consolidated.
        total: See :class:`Paced`, as for the other two.
        steps: Steps.
        rate: Learning rates.

    Example:
        >>> theta = torch.tensor([[0.5, 0.0]])
        >>> frozen = KroneckerBits.of(theta, bound=1.0, prior=1.0)
        >>> factors = Factors(torch.tensor([[15.0, 0.0], [0.0, 0.0]]), torch.eye(1))
        >>> frozen.consolidate(theta, factors)
        tensor([[2., 0.]])
        >>> frozen.held_back(theta + 0.5, pull=0.0)
        tensor([[0.7500, 0.5000]])

    Source:
        The basis is that of Ritter, Botev, Barber, Online Structured Laplace Approximations for Overcoming
        Catastrophic Forgetting, NeurIPS 2018.
    """

    anchor: Tensor
    input_basis: Tensor
    input_values: Tensor
    output_basis: Tensor
    output_values: Tensor
    prior: float
    bound: float
    max_bits: int = LARGEST_MAX_BITS
    rank: int | None = None
    tasks: int = 0
    total: int = 0
    steps: int = 0
    rate: float = 0.0

    @classmethod
    def of(
        cls,
        theta: Tensor,
        bound: float,
        prior: float,
        max_bits: int = LARGEST_MAX_BITS,
        rank: int | None = None,
    ) -> KroneckerBits:
        """The state before the first task: no direction is known to matter."""
        out, inputs = theta.shape
        return cls(
            theta.detach().clone(),
            theta.new_zeros(inputs, 0),
            theta.new_zeros(0),
            theta.new_zeros(out, 0),
            theta.new_zeros(0),
            prior,
            bound,
            max_bits,
            rank,
        )

    @property
    def information(self) -> Tensor:
        """S − S_0 of each coordinate, (l, k)."""
        return torch.outer(self.output_values, self.input_values) / max(self.tasks, 1)

    @property
    def precision(self) -> Tensor:
        """S of each coordinate, (l, k)."""
        return self.prior + self.information

    @property
    def bits(self) -> Tensor:
        """uint8: how many leading bits of each coordinate are frozen, (l, k)."""
        return exact_bits(self.precision, self.prior, self.max_bits)

    @property
    def width(self) -> Tensor:
        """How far each coordinate may be from 0, (l, k)."""
        return self.bound * torch.exp2(-self.bits.to(self.anchor.dtype))

    def coordinates(self, theta: Tensor) -> Tensor:
        """ω of a matrix, (l, k)."""
        return self.output_basis.T @ (theta - self.anchor) @ self.input_basis

    def hold_back(self, parameters: Sequence[Tensor], pull: float) -> None:
        """Pulls a layer and keeps it in its cells, in place.

        Args:
            parameters: Its weight and, if there is one, its bias.
            pull: See :meth:`held_back`.
        """
        held = self.held_back(as_matrix(parameters), pull)
        weight, *bias = parameters
        weight.copy_(held[:, : weight[0].numel()].view_as(weight))
        for theta in bias:
            theta.copy_(held[:, -1])

    def held_back(self, theta: Tensor, pull: float) -> Tensor:
        """A matrix, pulled towards the anchor and kept in its cells.

        Args:
            theta: The matrix.
            pull: η·λ: ω becomes ω/(1 + ηλ(S − S_0)).

        Returns:
            Another.
        """
        omega = self.coordinates(theta)
        width = self.width
        held = (omega / (1 + pull * self.information)).clamp(-width, width)
        return theta - self.output_basis @ (omega - held) @ self.input_basis.T

    def consolidate(self, theta: Tensor, factors: Factors) -> Tensor:
        """Adds what a task told, and anchors the matrix where it is.

        Args:
            theta: The matrix.
            factors: Of the task's Fisher information.

        Returns:
            The information gain of each coordinate of the new basis, in bits; what was known before is
            turned into the new basis as well.
        """
        before = (self.input_basis, self.input_values, self.output_basis, self.output_values)
        self.input_basis, self.input_values = self._eigen(self.input_basis, self.input_values, factors.A)
        self.output_basis, self.output_values = self._eigen(self.output_basis, self.output_values, factors.G)
        known = torch.outer(
            _turned(*before[2:], self.output_basis), _turned(*before[:2], self.input_basis)
        ) / max(self.tasks, 1)
        self.tasks += 1
        self.total = 0
        self.anchor = theta.detach().clone()
        return information_gain(self.precision, self.prior + known)

    def _eigen(self, basis: Tensor, values: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """The basis and values of the sum of what was known and a new factor, the largest first."""
        old = basis.double()
        values, vectors = torch.linalg.eigh(old * values.double() @ old.T + factor.double())
        kept = slice(-min(self.rank or len(values), len(values)), None)
        largest_first = values[kept].flip(0).clamp(min=0)
        return vectors[:, kept].flip(1).to(basis), largest_first.to(basis)

    def predicted_forgetting(self, omega: Tensor) -> Tensor:
        """½·Σ (S − S_0)·ω²/t: what coordinates cost the tasks learned, on average, in nats a sample."""
        return 0.5 * (self.information * omega.square()).sum() / max(self.tasks, 1)

    def to(self, device: torch.device) -> KroneckerBits:
        """The same state on a device."""
        return replace(
            self,
            anchor=self.anchor.to(device),
            input_basis=self.input_basis.to(device),
            input_values=self.input_values.to(device),
            output_basis=self.output_basis.to(device),
            output_values=self.output_values.to(device),
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to restore it exactly."""
        return dict(vars(self))


def as_matrix(parameters: Sequence[Tensor]) -> Tensor:
    """A layer's weight and, if there is one, its bias as one matrix, (out, in) or (out, in + 1).

    Example:
        >>> as_matrix([torch.ones(2, 3), torch.zeros(2)])
        tensor([[1., 1., 1., 0.],
                [1., 1., 1., 0.]])
    """
    weight, *bias = (theta.detach() for theta in parameters)
    return torch.cat([weight.flatten(1), *(theta.unsqueeze(1) for theta in bias)], dim=1)


def _turned(basis: Tensor, values: Tensor, new_basis: Tensor) -> Tensor:
    """The diagonal, in a new basis, of what has these eigenvalues in an old one."""
    return (new_basis.T @ basis).square() @ values
