"""What is frozen in one layer, in the Kronecker eigenbasis of its Fisher information."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_blip.fisher.factors import Factors
from lightning_blip.frozen.diagonal import LARGEST_MAX_BITS, Paced, check_numbers, exact_bits
from lightning_blip.frozen.information import information_gain
from lightning_blip.frozen.saved import check_number, check_tensor


@dataclass
class KroneckerBits(Paced):
    """The frozen state of a layer's matrix θ (out, in), a bias being one more column.

    With F ≈ G ⊗ A summed over tasks, A = U_A·diag(α)·U_Aᵀ and G = U_G·diag(γ)·U_Gᵀ, the coordinates
    ω = U_Gᵀ·(θ − θ*)·U_A have the precisions S = S_0 + γ·αᵀ/t. As θ in the diagonal basis, each coordinate
    has ½·log2(S/S_0) frozen bits, rounded, which leave it ±B·2^−bits: its cell, around 0, since the basis
    turns at each boundary; without any it is free. Bits and precisions follow from the eigenvalues: they take
    no memory.

    Beside the anchor it holds in² + out² numbers, however many tasks; with a ``rank``, at most
    rank·(in + out): of the directions that matter least only the mean of their eigenvalues is kept, by which
    they are pulled as if they were all alike; they have no cells.

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
        input_rest: ᾱ, the mean eigenvalue of the inputs' directions that are not kept.
        output_rest: γ̄, that of the outputs'.
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
    input_rest: float = 0.0
    output_rest: float = 0.0
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
        """How far each coordinate may be from 0, (l, k): as far as it likes without frozen bits."""
        bits = self.bits
        return (self.bound * torch.exp2(-bits.to(self.anchor.dtype))).masked_fill(bits == 0, math.inf)

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
        delta = theta - self.anchor
        if not self._is_whole:
            return theta - self._removed_with_rest(delta, pull)
        for block in self._blocks(pull):
            U_G, U_A = block.output_basis, block.input_basis
            removed = block._removed(torch.linalg.multi_dot([U_G.T, delta, U_A]), pull)
            theta = theta - torch.linalg.multi_dot([U_G, removed, U_A.T])
        return theta

    def _blocks(self, pull: float) -> Iterator[KroneckerBits]:
        """The coordinates with frozen bits, and those that the pull moves by more than a rounding error.

        The eigenvalues fall, so these are the fewer columns the further down the row: all of them lie in the
        first rows, as far as those go, and in the first columns of the rows below. In large layers that is
        the smaller part, which takes the smaller part of the products.
        """
        noticed = torch.finfo(self.anchor.dtype).eps / 2 / max(pull, 1e-30)
        # Half of what freezes a bit: rounding is not to hide one.
        least = min(noticed, self.prior / 2) * max(self.tasks, 1)
        gamma, alpha = self.output_values.cpu(), self.input_values.cpu()
        columns = torch.cat([torch.searchsorted(-alpha, -least / gamma), torch.zeros(1, dtype=torch.int64)])
        rows = int((columns + torch.arange(len(columns))).argmin())
        if rows:
            yield self._block(slice(rows), slice(int(columns[0])))
        yield self._block(slice(rows, None), slice(int(columns[rows])))

    def _block(self, rows: slice, columns: slice) -> KroneckerBits:
        return replace(
            self,
            output_basis=self.output_basis[:, rows],
            output_values=self.output_values[rows],
            input_basis=self.input_basis[:, columns],
            input_values=self.input_values[columns],
        )

    def _removed(self, omega: Tensor, pull: float) -> Tensor:
        """What pull and cells take from the coordinates."""
        width = self.width
        return omega - (omega / (1 + pull * self.information)).clamp(-width, width)

    def _removed_with_rest(self, delta: Tensor, pull: float) -> Tensor:
        """What they take from a matrix, minus the anchor, where only the mean is known of most directions."""
        U_G, U_A = self.output_basis, self.input_basis
        along_outputs = U_G.T @ delta
        omega = along_outputs @ U_A
        # s/(1 + s) of what lies along kept outputs alone, along kept inputs alone, and along neither.
        outputs, inputs, rest = (1 - 1 / (1 + pull * one) for one in self._information_of_rest)
        inside = (self._removed(omega, pull) - rest * omega) @ U_A.T
        inside += (outputs - rest) * (along_outputs - omega @ U_A.T)
        outside = (inputs - rest) * (delta @ U_A - U_G @ omega) @ U_A.T
        return U_G @ inside + outside + rest * delta

    def consolidate(self, theta: Tensor, factors: Factors) -> Tensor:
        """Adds what a task told, and anchors the matrix where it is.

        Args:
            theta: The matrix.
            factors: Of the task's Fisher information.

        Returns:
            The information gain of each coordinate of the new basis, in bits; what was known before is
            turned into the new basis as well.
        """
        of_input = (self.input_basis, self.input_values, self.input_rest)
        of_output = (self.output_basis, self.output_values, self.output_rest)
        self.input_basis, self.input_values, self.input_rest = _sum(*of_input, factors.A, self.rank)
        self.output_basis, self.output_values, self.output_rest = _sum(*of_output, factors.G, self.rank)
        known = torch.outer(
            _turned(*of_output, self.output_basis), _turned(*of_input, self.input_basis)
        ) / max(self.tasks, 1)
        self.tasks += 1
        self.total = 0
        self.anchor = theta.detach().clone()
        return information_gain(self.precision, self.prior + known)

    def strain(self, theta: Tensor) -> tuple[float, int]:
        """What a matrix costs the tasks learned, and how much of it is held back.

        Args:
            theta: The matrix.

        Returns:
            ½·Σ (S − S_0)·ω²/t, on average over the tasks, in nats a sample; and how many coordinates lie at,
            or beyond, the walls of cells with frozen bits.
        """
        delta = theta - self.anchor
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
        return 0.5 * float(cost) / max(self.tasks, 1), int(at_walls.sum())

    @property
    def _is_whole(self) -> bool:
        """Whether all directions are kept."""
        return self.input_rest == self.output_rest == 0.0

    @property
    def _information_of_rest(self) -> tuple[Tensor, Tensor, float]:
        """S − S_0 along kept outputs and no kept input, (l, 1), the reverse, (k,), and along neither."""
        t = max(self.tasks, 1)
        return (
            self.output_values[:, None] * (self.input_rest / t),
            self.input_values * (self.output_rest / t),
            self.output_rest * self.input_rest / t,
        )

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

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> KroneckerBits:
        """Restores what :meth:`state_dict` saved, exactly.

        Raises:
            ValueError: If it is not what :meth:`state_dict` gives.
        """
        floats = [torch.float32, torch.float64]
        out, inputs = state["anchor"].shape
        check_tensor(state, "anchor", floats, (out, inputs))
        for side, size in (("input", inputs), ("output", out)):
            kept = len(state[f"{side}_values"])
            check_tensor(state, f"{side}_values", floats, (kept,))
            check_tensor(state, f"{side}_basis", floats, (size, kept))
            check_number(state, f"{side}_rest", 0)
        check_numbers(state)
        return cls(**state)


def as_matrix(parameters: Sequence[Tensor]) -> Tensor:
    """A layer's weight and, if there is one, its bias as one matrix, (out, in) or (out, in + 1).

    Example:
        >>> as_matrix([torch.ones(2, 3), torch.zeros(2)])
        tensor([[1., 1., 1., 0.],
                [1., 1., 1., 0.]])
    """
    weight, *bias = (theta.detach() for theta in parameters)
    return torch.cat([weight.flatten(1), *(theta.unsqueeze(1) for theta in bias)], dim=1)


def _sum(
    basis: Tensor, values: Tensor, rest: float, factor: Tensor, rank: int | None
) -> tuple[Tensor, Tensor, float]:
    """Eigenvectors and values of what was known and a new factor, the largest first, and the rest's mean."""
    old = basis.double()
    total = old * (values.double() - rest) @ old.T + factor.double()
    total.diagonal().add_(rest)
    found, vectors = torch.linalg.eigh(total)
    largest_first = found.flip(0).clamp(min=0)
    kept, left = largest_first[:rank], largest_first[rank or len(found) :]
    return vectors.flip(1)[:, :rank].to(basis), kept.to(basis), float(left.mean()) if len(left) else 0.0


def _turned(basis: Tensor, values: Tensor, rest: float, new_basis: Tensor) -> Tensor:
    """The diagonal, in a new basis, of what has these eigenvalues in an old one, and one for all the rest."""
    return rest + (new_basis.T @ basis).square() @ (values - rest)
