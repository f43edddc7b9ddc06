"""The diagonal basis: the frozen state of one parameter, value by value, in 6 bytes per value."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_blip.frozen.base import (
    Collector,
    Freezing,
    FrozenState,
    Step,
    Stepper,
    Strain,
    TaskInformation,
)
from lightning_blip.frozen.checks import check_number, check_tensor
from lightning_blip.frozen.fused import FusedStepper
from lightning_blip.frozen.gains import RuleName, average_fisher, exact_bits, information_gain, paper_bits
from lightning_blip.frozen.packing import (
    BITS_FIELD,
    BITS_MASK,
    LARGEST_MAX_BITS,
    CellName,
    cell_codes,
    checksum,
    code_of_zero,
    decode,
    dropped_bits,
    encode,
    encode_leading,
    free_bits,
    middle_of,
    store_information,
    stored_information,
)


@dataclass(frozen=True)
class DiagonalInformation(TaskInformation):
    """The diagonal of a task's Fisher information.

    Attributes:
        fisher: F_t, of the parameter's shape.
        is_matrix: Whether the first dimension are the outputs of a linear map or convolution.
    """

    fisher: Tensor
    is_matrix: bool = False

    def damped(self, damping: float) -> DiagonalInformation:
        """Return F_ij + δ·mean_i F_ij; other parameters than those of matrices as they are."""
        if not self.is_matrix:
            return self
        return DiagonalInformation(self.fisher + damping * self.fisher.mean(0, keepdim=True), self.is_matrix)

    def coordinates(self) -> Tensor:
        """Return F_t itself."""
        return self.fisher


@dataclass(frozen=True)
class _Squares(Collector):
    """Needs nothing but the squared gradients."""

    name: str
    is_matrix: bool

    def information(self, fishers: Mapping[str, Tensor]) -> DiagonalInformation:
        return DiagonalInformation(fishers[self.name], self.is_matrix)


@dataclass(eq=False)
class DiagonalState(FrozenState):
    """The frozen state of one parameter tensor: 6 bytes per value for any number of tasks.

    In the strict cell the anchor keeps 8 bits behind the frozen ones, 1/256 of its cell: later bits are far
    below what the information resolves. The frozen bits can be read from the parameter itself, which never
    leaves its cell. So :meth:`state_dict` takes 3 bytes per value, and still restores the state exactly.

    Attributes:
        prior: S_0.
        bound: B; the values are kept in (−B, B).
        packed: int32, the anchor's code and the number of frozen bits (the lowest five bits) of each value.
        gained: float16, the information I = (S_t − S_0)/S_0 of all tasks, see
            :func:`lightning_blip.frozen.packing.store_information`. The prior is not part of the sum, so a
            small gain is not lost beside it.
        checksum: Of the frozen bits that :meth:`locate` has yet to read from the parameter, else None.

    Example:
        >>> theta = torch.tensor([0.3, -0.6])
        >>> state = DiagonalState.of(theta, bound=1.0, prior=1e-6)
        >>> state.freeze(theta, bits=torch.tensor([2, 0]), keep_free_bits=True)
        >>> low, high = state.limits(torch.float32)
        >>> low, high
        (tensor([ 0.1667, -1.0000]), tensor([0.4167, 1.0000]))
    """

    kind: ClassVar[str] = "diagonal"

    packed: Tensor
    gained: Tensor
    checksum: int | None = None

    @classmethod
    def claim(cls, module: nn.Module, names: Container[str]) -> list[tuple[str, ...]]:
        """Return every parameter, each by itself."""
        return [(name,) for name, _ in module.named_parameters() if name in names]

    @classmethod
    def create(cls, parameters: Sequence[Tensor], bound: float, prior: float, freezing: Freezing) -> Self:
        """Return the state of one parameter before its first task."""
        (theta,) = parameters
        packed = torch.zeros_like(theta, dtype=torch.int32, requires_grad=False)
        gained = torch.zeros_like(theta, dtype=torch.float16, requires_grad=False)
        state = cls(prior, bound, packed, gained, freezing=freezing)
        state._anchor_at(encode(theta.detach(), bound, freezing.max_bits), packed)
        return state

    @classmethod
    def of(
        cls,
        theta: Tensor,
        bound: float,
        prior: float,
        max_bits: int = LARGEST_MAX_BITS,
        cell: CellName = "strict",
        rule: RuleName = "exact",
    ) -> Self:
        """Return the state of a parameter before its first task: nothing frozen, precision at the prior."""
        return cls.create([theta], bound, prior, Freezing(max_bits, rule, cell))

    @staticmethod
    def shape_of(parameters: Sequence[Tensor]) -> tuple[int, ...]:
        """Return the parameter's own shape."""
        return tuple(parameters[0].shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape."""
        return tuple(self.packed.shape)

    @property
    def values(self) -> int:
        """The number of values."""
        return self.packed.numel()

    @property
    def bits(self) -> Tensor:
        """uint8: the number of frozen leading bits of each value."""
        return (self.packed & BITS_MASK).to(torch.uint8)

    @property
    def code(self) -> Tensor:
        """int32: each value's anchor, as a code on the grid of N bits."""
        if self.checksum is not None:
            raise ValueError("The state was restored without its parameter: call locate([theta]) first")
        return self.packed >> BITS_FIELD

    @property
    def information(self) -> Tensor:
        """float32: I, the information of all tasks in units of the prior."""
        return stored_information(self.gained)

    @information.setter
    def information(self, value: Tensor) -> None:
        self.gained = store_information(value.to(torch.float32))

    @property
    def informed(self) -> bool:
        """Whether any task gave information."""
        return bool(self.gained.any())

    @property
    def posterior(self) -> Tensor:
        """float32: S_t = S_0·(1 + I), the posterior precision of the exact rule."""
        return self.prior * (1.0 + self.information)

    @property
    def precision(self) -> Tensor:
        """float32: S_t, or F_{0:t} = S_t/(t + 1) of the paper's rule."""
        return self.posterior if self.freezing.rule == "exact" else self.posterior / (self.tasks + 1)

    def anchor(self, dtype: torch.dtype) -> Tensor:
        """Return θ*, the values right after the last boundary; in the strict cell to 1/256 of the cell."""
        return decode(self.code, self.bound, self.freezing.max_bits, dtype)

    def limits(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the lowest and the highest value that the frozen bits allow."""
        max_bits = self.freezing.max_bits
        low, high = cell_codes(self.code, self.bits, max_bits, self.freezing.cell)
        return decode(low, self.bound, max_bits, dtype), decode(high, self.bound, max_bits, dtype)

    def frozen_code(self, theta: Tensor) -> Tensor:
        """Return the frozen leading bits, read from the values themselves.

        They are ⌊(θ/B + ⅓)·2^bits⌋ in the strict cell, ⌊θ/B·2^bits⌋ in the paper's, and 0 where bits = 0.
        """
        bits, max_bits = self.bits.to(torch.int32), self.freezing.max_bits
        code = encode(theta.detach(), self.bound, max_bits)
        if self.freezing.cell == "strict":
            code = code + 2**max_bits // 3
        return (code >> (max_bits - bits)).masked_fill(bits == 0, 0)

    def immovable(self) -> Tensor | None:
        """Return a mask of the values with all bits frozen; None where there is no such value."""
        mask = self.packed & BITS_MASK == self.freezing.max_bits
        return mask if bool(mask.any()) else None

    def observe(self, names: Sequence[str], is_matrix: bool) -> Collector:
        """Return a collector of the squared gradients."""
        return _Squares(names[0], is_matrix)

    @torch.no_grad()
    def consolidate(self, parameters: Sequence[Tensor], information: DiagonalInformation) -> Tensor:
        """Add F_t, anchor the parameter where it is and freeze its bits.

        Example:
            >>> theta = torch.tensor([0.3, -0.6])
            >>> state = DiagonalState.of(theta, bound=1.0, prior=1.0)
            >>> state.consolidate([theta], DiagonalInformation(torch.tensor([15.0, 0.0])))
            tensor([2., 0.])
            >>> state.bits
            tensor([2, 0], dtype=torch.uint8)
        """
        (theta,), max_bits = parameters, self.freezing.max_bits
        before = self.precision
        fisher = information.fisher.to(before)
        self.information = self.information + fisher / self.prior
        if self.freezing.rule == "exact":
            after = self.posterior
            # From the precision as it is stored, so that a checkpoint need not hold the bits.
            bits = exact_bits(after, self.prior, max_bits)
        else:
            after = average_fisher(before, fisher, self.tasks + 1)
            bits = paper_bits(self.bits, information_gain(after, before), max_bits)
        self.freeze(theta, bits, keep_free_bits=self.freezing.rule == "exact")
        return information_gain(after, before)

    @torch.no_grad()
    def freeze(self, theta: Tensor, bits: Tensor, keep_free_bits: bool) -> None:
        """Anchor the parameter where it is and freeze its leading bits.

        Args:
            theta: The parameter, moved onto the grid in place: by half a step of the N-bit grid at most if
                the free bits are kept, else rounded to its frozen bits.
            bits: The number of leading bits that are frozen from now on, same shape; never fewer than before.
            keep_free_bits: Whether the bits behind the frozen ones keep their values.
        """
        max_bits = self.freezing.max_bits
        code = (
            encode(theta, self.bound, max_bits)
            if keep_free_bits
            else encode_leading(theta, bits, self.bound, max_bits)
        )
        # Cells nest: bits that were frozen at an earlier boundary also limit the rounding at this one.
        code = code.clamp(*cell_codes(self.code, self.bits, max_bits, self.freezing.cell))
        self._anchor_at(code, bits.to(torch.int32))
        self.tasks += 1
        self.pace.total = 0
        theta.copy_(decode(code, self.bound, max_bits, theta.dtype))

    def hold_back(self, step: Step) -> None:
        """Pull and project one step, in place, without scaling; see :mod:`lightning_blip.frozen.fused`."""
        self.stepper()([step], scale=0.0)

    @classmethod
    def stepper(cls) -> Stepper:
        """Return the stepper that holds back many parameters at once."""
        return FusedStepper()

    def settle(self, parameters: Sequence[Tensor]) -> None:
        """Put the parameter into its cell."""
        (theta,) = parameters
        theta.clamp_(*self.limits(theta.dtype))

    def strain(self, parameters: Sequence[Tensor]) -> Strain:
        """Return the predicted forgetting, and the number of values at their walls."""
        theta = parameters[0].detach()
        low, high = self.limits(theta.dtype)
        at_walls = (self.bits > 0) & ((theta <= low) | (theta >= high))
        drift = theta - self.anchor(theta.dtype)
        forgetting = 0.5 * self.prior * (self.information * drift.square()).sum() / max(self.tasks, 1)
        return Strain(float(forgetting), int(at_walls.sum()))

    def drifted(self, parameters: Sequence[Tensor]) -> int:
        """Return the number of values whose frozen bits differ from those of the anchor."""
        (theta,) = parameters
        return int((self.frozen_code(theta) != self.frozen_code(self.anchor(theta.dtype))).sum())

    def locate(self, parameters: Sequence[Tensor]) -> None:
        """Complete a restored state with the frozen bits, which are part of the parameter itself.

        Args:
            parameters: The parameter, as it was when the state was saved.

        Raises:
            ValueError: If its frozen bits are others.
        """
        if self.checksum is None:
            return
        (theta,), free, zero = parameters, self._free_bits, self._code_of_zero
        code = encode(theta.detach().to(self.packed.device), self.bound, self.freezing.max_bits) + zero
        if checksum(code >> free) != self.checksum:
            raise ValueError(
                "The parameter's frozen bits are not those that were saved with its state: load the module's "
                "weights from the same checkpoint first"
            )
        self.packed = self.packed + (((code >> free << free) - zero) << BITS_FIELD)
        self.checksum = None

    @property
    def is_located(self) -> bool:
        """Whether the frozen bits have been read from the parameter."""
        return self.checksum is None

    def state_dict(self) -> dict[str, Any]:
        """Return everything that restores the state exactly, in the strict cell together with the weights."""
        state = super().state_dict()
        if self.freezing.cell == "paper":
            return state
        del state["packed"]
        bits, free = self.bits, self._free_bits
        derived = torch.equal(bits, exact_bits(self.posterior, self.prior, self.freezing.max_bits))
        code = self._counted_code
        return {
            **state,
            "bits": None if derived else bits,
            "position": ((code & ~(-1 << free)) >> dropped_bits(free)).to(torch.uint8),
            "checksum": checksum(code >> free) if self.checksum is None else self.checksum,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Self:
        """Return the state that :meth:`state_dict` saved.

        Bits and information are complete at once; in the strict cell the anchor is after :meth:`locate`.

        Raises:
            ValueError: If an entry is damaged.
        """
        _check_saved(state)
        if state["freezing"]["cell"] == "paper":
            return super().from_state_dict(state)
        rest = {name: value for name, value in state.items() if name not in ("position", "bits")}
        frozen, bits = super().from_state_dict({**rest, "packed": state["position"]}), state["bits"]
        if bits is None:
            bits = exact_bits(frozen.posterior, frozen.prior, frozen.freezing.max_bits)
        unkept = dropped_bits(free_bits(bits.to(torch.int32), frozen.freezing.max_bits))
        code = middle_of(state["position"].to(torch.int32) << unkept, unkept)
        frozen.packed = (code << BITS_FIELD) | bits.to(torch.int32)
        return frozen

    @property
    def _free_bits(self) -> Tensor:
        return free_bits(self.packed & BITS_MASK, self.freezing.max_bits)

    @property
    def _code_of_zero(self) -> Tensor:
        return code_of_zero(self.packed & BITS_MASK, self.freezing.max_bits)

    @property
    def _counted_code(self) -> Tensor:
        """The code with the offset of its cell; its frozen bits are 0 until they are located."""
        code = self.packed >> BITS_FIELD
        return code + self._code_of_zero if self.checksum is None else code

    def _anchor_at(self, code: Tensor, bits: Tensor) -> None:
        if self.freezing.cell == "strict":
            zero = code_of_zero(bits, self.freezing.max_bits)
            code = middle_of(code + zero, dropped_bits(free_bits(bits, self.freezing.max_bits))) - zero
        self.packed = (code << BITS_FIELD) | bits


def _check_saved(state: Mapping[str, Any]) -> None:
    shape, cell = state["gained"].shape, state["freezing"]["cell"]
    check_tensor(state, "gained", [torch.float16], shape)
    if cell == "paper":
        check_tensor(state, "packed", [torch.int32], shape)
        return
    check_tensor(state, "position", [torch.uint8], shape)
    check_number(state, "checksum", -(2**63))
    if state["bits"] is not None:
        check_tensor(state, "bits", [torch.uint8], shape)
        if (state["bits"] > state["freezing"]["max_bits"]).any():
            raise ValueError(f"bits has more than max_bits={state['freezing']['max_bits']}")
