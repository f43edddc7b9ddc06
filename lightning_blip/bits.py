"""What is frozen in one parameter: codes on a grid, cells, and the packed state that holds them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

Cell = Literal["strict", "paper"]

#: float32 carries 24 leading bits: up to this many fractional bits a code survives the way to θ and back.
LARGEST_MAX_BITS = 20
_BITS_FIELD = 5
_BITS_MASK = (1 << _BITS_FIELD) - 1


def bound(theta: Tensor, fan_in: int | None = None, *, bias: bool = False) -> float:
    """The bound B of a parameter tensor, whose values are kept in (−B, B).

    Args:
        theta: The parameter's values at the start of training.
        fan_in: Inputs of each output of the Linear or Conv layer that owns it; None for any other parameter.
        bias: Whether it is the bias of such a layer.

    Returns:
        6/√fan_in for a layer's weight and 1 for its bias. For any other parameter, or where a value already
        lies outside, the power of two, at least 1, that holds twice the largest |θ|.

    Example:
        >>> bound(torch.zeros(3, 4), fan_in=4)
        3.0
        >>> bound(torch.tensor([1.0, -2.5]))
        8.0

    Source:
        BLIP (Shi et al., CVPR 2021), section 3.2, for the bound of a layer.
    """
    largest = float(theta.detach().abs().amax()) if theta.numel() else 0.0
    if fan_in is not None:
        of_layer = 1.0 if bias else 6.0 / fan_in**0.5
        if largest < of_layer:
            return of_layer
    power = 1.0
    while power < 2.0 * largest:
        power *= 2.0
    return power


def encode(theta: Tensor, bound: float, max_bits: int) -> Tensor:
    """The nearest code k of each value on the grid k·2^−N·B, |k| < 2^N.

    Args:
        theta: Values, any shape.
        bound: B, in the units of ``theta``.
        max_bits: N, the fractional bits of θ/B.

    Returns:
        int32 codes, same shape.

    Example:
        >>> encode(torch.tensor([0.26, -1.0, 1.0]), bound=1.0, max_bits=3)
        tensor([ 2, -7,  7], dtype=torch.int32)
    """
    largest = 2**max_bits - 1
    scaled = theta / bound * float(2**max_bits)
    return scaled.round().clamp(-largest, largest).to(torch.int32)


def decode(code: Tensor, bound: float, max_bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values k·2^−N·B of codes k; ``encode`` finds the same codes again.

    Example:
        >>> decode(torch.tensor([2, -7]), bound=1.0, max_bits=3)
        tensor([ 0.2500, -0.8750])
    """
    step = bound / float(2**max_bits)
    return code.to(dtype) * step


def encode_leading(theta: Tensor, bits: Tensor, bound: float, max_bits: int) -> Tensor:
    """The code of θ rounded to its leading bits alone: B·round(θ/B·2^bits)/2^bits, and 0 where bits = 0.

    Args:
        theta: Values, any shape.
        bits: How many leading bits each value keeps, 0 to N, same shape.
        bound: B.
        max_bits: N.

    Returns:
        int32 codes on the grid of N bits, same shape.

    Example:
        >>> encode_leading(torch.tensor([0.7, 0.7]), torch.tensor([0, 1]), bound=1.0, max_bits=3)
        tensor([0, 4], dtype=torch.int32)

    Source:
        BLIP (Shi et al., CVPR 2021), section 3.3.
    """
    kept = torch.exp2(bits.to(theta.dtype))
    rounded = (theta / bound * kept).round() / kept * bound
    return encode(rounded.masked_fill(bits == 0, 0.0), bound, max_bits)


def cell_codes(code: Tensor, bits: Tensor, max_bits: int, cell: Cell) -> tuple[Tensor, Tensor]:
    """The lowest and the highest code that a parameter may take while its leading bits are frozen.

    In the strict cell the code ⌊θ/B·2^bits⌋ (two's complement) never changes; in the paper's, θ stays within
    ±B·2^−bits of its anchor. Zero bits leave the whole interval free, all N of them nothing.

    Args:
        code: int32 codes of the anchors on the grid of N bits.
        bits: How many leading bits of each are frozen, 0 to N, same shape.
        max_bits: N.
        cell: ``"strict"`` or ``"paper"``.

    Returns:
        Two int32 tensors, lowest and highest code, both included.

    Example:
        >>> cell_codes(torch.tensor([5]), torch.tensor([2]), max_bits=4, cell="strict")
        (tensor([4]), tensor([7]))
        >>> cell_codes(torch.tensor([5]), torch.tensor([2]), max_bits=4, cell="paper")
        (tensor([1]), tensor([9]))
    """
    largest = 2**max_bits - 1
    free = max_bits - bits.to(code.dtype)
    width = torch.ones_like(code) << free
    if cell == "strict":
        low = (code >> free) << free
        high = low + width - 1
    else:
        low, high = code - width, code + width
    nothing, everything = bits == 0, bits == max_bits
    low = torch.where(everything, code, low.masked_fill(nothing, -largest)).clamp(min=-largest)
    high = torch.where(everything, code, high.masked_fill(nothing, largest)).clamp(max=largest)
    return low, high


@dataclass
class FrozenBits:
    """The frozen state of one parameter tensor: 8 bytes a value, however many tasks were learned.

    Attributes:
        packed: int32, each value's anchor code and its number of frozen bits (the lowest five bits).
        precision: float32, S_t of the exact rule or F_{0:t} of the paper's (information per value).
        prior: The precision before the first task, the same for the whole tensor.
        bound: B; the values are kept in (−B, B).
        max_bits: N, the most bits that can be frozen.
        cell: ``"strict"`` or ``"paper"``, see :func:`cell_codes`.
        tasks: How many tasks have been consolidated into it.

    Example:
        >>> theta = torch.tensor([0.3, -0.6])
        >>> frozen = FrozenBits.of(theta, bound=1.0, prior=1e-6)
        >>> frozen.freeze(theta, bits=torch.tensor([2, 0]), keep_free_bits=True)
        >>> low, high = frozen.limits(torch.float32)
        >>> low, high
        (tensor([ 0.2500, -1.0000]), tensor([0.5000, 1.0000]))
    """

    packed: Tensor
    precision: Tensor
    prior: float
    bound: float
    max_bits: int = LARGEST_MAX_BITS
    cell: Cell = "strict"
    tasks: int = 0

    @classmethod
    def of(
        cls,
        theta: Tensor,
        bound: float,
        prior: float,
        max_bits: int = LARGEST_MAX_BITS,
        cell: Cell = "strict",
    ) -> FrozenBits:
        """The state of a parameter before its first task: nothing frozen, precision at the prior."""
        packed = encode(theta.detach(), bound, max_bits) << _BITS_FIELD
        precision = torch.full_like(theta, prior, dtype=torch.float32, requires_grad=False)
        return cls(packed, precision, prior, bound, max_bits, cell)

    @property
    def bits(self) -> Tensor:
        """uint8: how many leading bits of each value are frozen."""
        return (self.packed & _BITS_MASK).to(torch.uint8)

    @property
    def code(self) -> Tensor:
        """int32: each value's anchor, as a code on the grid of N bits."""
        return self.packed >> _BITS_FIELD

    def anchor(self, dtype: torch.dtype) -> Tensor:
        """θ*, the values right after the last boundary."""
        return decode(self.code, self.bound, self.max_bits, dtype)

    def limits(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The lowest and the highest value that the frozen bits allow."""
        low, high = cell_codes(self.code, self.bits, self.max_bits, self.cell)
        return (
            decode(low, self.bound, self.max_bits, dtype),
            decode(high, self.bound, self.max_bits, dtype),
        )

    def frozen_code(self, theta: Tensor) -> Tensor:
        """The frozen leading bits as read back from the values themselves: ⌊θ/B·2^bits⌋, 0 where bits = 0."""
        bits = self.bits.to(torch.int32)
        code = encode(theta.detach(), self.bound, self.max_bits) >> (self.max_bits - bits)
        return code.masked_fill(bits == 0, 0)

    @torch.no_grad()
    def freeze(self, theta: Tensor, bits: Tensor, keep_free_bits: bool) -> None:
        """Anchors a parameter where it is and freezes its leading bits.

        Args:
            theta: The parameter, moved in place onto the grid: by half a step of the N-bit grid at most if
                the free bits are kept, else rounded to its frozen bits.
            bits: How many leading bits are frozen from now on, same shape; never fewer than before.
            keep_free_bits: Whether the bits behind the frozen ones keep their values.
        """
        code = (
            encode(theta, self.bound, self.max_bits)
            if keep_free_bits
            else encode_leading(theta, bits, self.bound, self.max_bits)
        )
        # Cells nest: what was frozen at an earlier boundary also binds the rounding at this one.
        code = code.clamp(*cell_codes(self.code, self.bits, self.max_bits, self.cell))
        self.packed = (code << _BITS_FIELD) | bits.to(torch.int32)
        self.tasks += 1
        theta.copy_(self.anchor(theta.dtype))

    def to(self, device: torch.device) -> FrozenBits:
        """The same state on a device."""
        return replace(self, packed=self.packed.to(device), precision=self.precision.to(device))

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to restore it exactly."""
        return dict(vars(self))

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> FrozenBits:
        """Restores what :meth:`state_dict` saved, exactly."""
        return cls(**state)
