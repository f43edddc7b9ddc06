"""What is frozen in one parameter: codes on a grid, cells, and the packed state that holds them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_blip.frozen.saved import check_number, check_tensor

Cell = Literal["strict", "paper"]

#: float32 carries 24 leading bits: up to this many fractional bits a code survives the way to θ and back.
LARGEST_MAX_BITS = 20
BITS_FIELD = 5
BITS_MASK = (1 << BITS_FIELD) - 1
# See store_information.
_SMALL_UNIT, _LARGE_UNIT = 2.0**-6, 2.0**24
_LARGE_FROM = 1023.0
_MOST_INFORMATION = _LARGE_UNIT * torch.finfo(torch.float16).max
# Of the bits behind the frozen ones an anchor keeps these, which fill a byte.
_BITS_BEHIND = 8
_CHECKED_AT_ONCE = 2**16


def bound(theta: Tensor, fan_in: int | None = None, *, bias: bool = False) -> float:
    """The bound B of a parameter tensor, whose values are kept in (−B, B).

    Args:
        theta: The parameter's values at the start of training.
        fan_in: Inputs of each output of the Linear or Conv layer that owns it, or whatever counts as that;
            None for any other parameter.
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


def store_information(information: Tensor) -> Tensor:
    """Information in 16 bits: a float16 whose sign is one more bit of its exponent, since none is negative.

    Information up to about 2^10 prior precisions is positive, in units of 2^−6; larger information is
    negative, in units of 2^24. The relative error is at most 2^−11, an eighth of bfloat16's, from 2^−20 to
    2^40, where it saturates; 2^−30 is the smallest above 0. Reading takes no bit operations, which compilers
    do not vectorise in 16 bits, and what was read is stored as the same again: information never decreases.

    Example:
        >>> store_information(torch.tensor([0.0, 3.0, 2.0**30]))
        tensor([   0.,  192.,  -64.], dtype=torch.float16)
    """
    large = -(information.clamp(max=_MOST_INFORMATION) / _LARGE_UNIT)
    return torch.where(information < _LARGE_FROM, information / _SMALL_UNIT, large).to(torch.float16)


def stored_information(stored: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What :func:`store_information` stored.

    Example:
        >>> stored_information(torch.tensor([0.0, 192.0, -64.0], dtype=torch.float16))
        tensor([0.0000e+00, 3.0000e+00, 1.0737e+09])
    """
    value = stored.to(dtype)
    return torch.where(value < 0, value * -_LARGE_UNIT, value * _SMALL_UNIT)


def exact_bits(precision: Tensor, prior: float, max_bits: int) -> Tensor:
    """The bits that the exact rule freezes: the whole number nearest to ½·log2(S_t/S_0), N at most.

    The gains of all tasks telescope into one logarithm, so nothing is lost to rounding once per task. Rounded
    up, as each task's gain is in the paper, any trace of information would freeze a bit: half of what a
    parameter can be.

    Example:
        >>> exact_bits(torch.tensor([1.0, 1.9, 2.0, 16.0]), prior=1.0, max_bits=20)
        tensor([0, 0, 1, 2], dtype=torch.uint8)
    """
    # The pattern of a float32 is its exponent and then its mantissa. Counted from half a bit, in two whole
    # exponents, it gives the same bits on every machine, as a checkpoint that does not hold them needs it.
    pattern = (precision.to(torch.float32) / prior).view(torch.int32) - (127 << 23)
    return ((pattern + (1 << 23)) >> 24).clamp(0, max_bits).to(torch.uint8)


def _free_bits(bits: Tensor, max_bits: int) -> Tensor:
    """How many of a code's N + 1 bits are free: where nothing is frozen, the sign is as well."""
    return max_bits - bits + (bits == 0)


def _place_of_zero(bits: Tensor, max_bits: int) -> Tensor:
    """What code 0 becomes where codes are counted so that cells begin at multiples of their width.

    With all N + 1 bits free the only cell is the interval, which begins at −2^N.
    """
    third = torch.full_like(bits, 2**max_bits // 3, dtype=torch.int32)
    zero: Tensor = third.masked_fill(bits == 0, 0) + 2**max_bits
    return zero


def cell_codes(code: Tensor, bits: Tensor, max_bits: int, cell: Cell) -> tuple[Tensor, Tensor]:
    """The lowest and the highest code that a parameter may take while its leading bits are frozen.

    In the strict cell the code ⌊(θ/B + ⅓)·2^bits⌋ never changes. The third keeps 0 away from the edges of
    all cells, however many bits: without it, one frozen bit would hold the sign of a weight near 0. In the
    paper's cell, θ stays within ±B·2^−bits of its anchor. Zero bits leave the whole interval free, all N of
    them nothing.

    Args:
        code: int32 codes of the anchors on the grid of N bits.
        bits: How many leading bits of each are frozen, 0 to N, same shape.
        max_bits: N.
        cell: ``"strict"`` or ``"paper"``.

    Returns:
        Two int32 tensors, lowest and highest code, both included.

    Example:
        >>> cell_codes(torch.tensor([5]), torch.tensor([2]), max_bits=4, cell="strict")
        (tensor([3]), tensor([6]))
        >>> cell_codes(torch.tensor([5]), torch.tensor([2]), max_bits=4, cell="paper")
        (tensor([1]), tensor([9]))
    """
    most = 2**max_bits
    free = _free_bits(bits.to(code.dtype), max_bits)
    if cell == "strict":
        leading, zero = -1 << free, _place_of_zero(bits, max_bits)
        low = ((code + zero) & leading) - zero
        return low.clamp(min=1 - most), (low + ~leading).clamp(max=most - 1)
    width = (1 << free) & -2  # 0 where no bit is free
    return (code - width).clamp(min=1 - most), (code + width).clamp(max=most - 1)


class Paced:
    """Counts the steps, and adds up their learning rates, until a pull is due.

    The pulls lie a twentieth of the steps since the boundary apart: so there are enough of them in short
    tasks, too.

    Attributes:
        total: How many steps there were since the last boundary.
        steps: How many since the last pull.
        rate: The sum of their learning rates.
    """

    total: int
    steps: int
    rate: float

    def due(self, rate: float, every: int) -> float:
        """Counts a step; the sum of the rates if a pull is due, else 0.

        Args:
            rate: The step's learning rate.
            every: The most steps from one pull to the next.
        """
        self.total += 1
        self.steps += 1
        self.rate += rate
        return self.collected() if self.steps >= min(every, 1 + self.total // 20) else 0.0

    def collected(self) -> float:
        """The sum of the rates since the last pull; the next one is counted from here."""
        rate = self.rate
        self.steps, self.rate = 0, 0.0
        return rate


@dataclass
class FrozenBits(Paced):
    """The frozen state of one parameter tensor: 6 bytes a value, however many tasks were learned.

    In the strict cell the anchor is kept to 8 bits behind the frozen ones, 1/256 of its cell: the bits behind
    those are far below what the information tells. The frozen ones can be read from the parameter itself,
    which never leaves its cell. So :meth:`state_dict` takes 3 bytes a value, and still restores all exactly.

    Attributes:
        packed: int32, each value's anchor code and its number of frozen bits (the lowest five bits).
        gained: float16, the information I = (S_t − S_0)/S_0 that all tasks gave, see
            :func:`store_information`. Without the prior in the sum, a small gain is not lost beside it.
        prior: S_0, the precision before the first task, the same for the whole tensor.
        bound: B; the values are kept in (−B, B).
        max_bits: N, the most bits that can be frozen.
        cell: ``"strict"`` or ``"paper"``, see :func:`cell_codes`.
        tasks: How many tasks have been consolidated into it.
        checksum: Of the frozen bits that :meth:`locate` has yet to read from the parameter; None once it has.
        total: See :class:`Paced`, as for the other two.
        steps: Steps.
        rate: Learning rates.

    Example:
        >>> theta = torch.tensor([0.3, -0.6])
        >>> frozen = FrozenBits.of(theta, bound=1.0, prior=1e-6)
        >>> frozen.freeze(theta, bits=torch.tensor([2, 0]), keep_free_bits=True)
        >>> low, high = frozen.limits(torch.float32)
        >>> low, high
        (tensor([ 0.1667, -1.0000]), tensor([0.4167, 1.0000]))
    """

    packed: Tensor
    gained: Tensor
    prior: float
    bound: float
    max_bits: int = LARGEST_MAX_BITS
    cell: Cell = "strict"
    tasks: int = 0
    checksum: int | None = None
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
        cell: Cell = "strict",
    ) -> FrozenBits:
        """The state of a parameter before its first task: nothing frozen, precision at the prior."""
        packed = torch.zeros_like(theta, dtype=torch.int32, requires_grad=False)
        gained = torch.zeros_like(theta, dtype=torch.float16, requires_grad=False)
        frozen = cls(packed, gained, prior, bound, max_bits, cell)
        frozen._anchor_at(encode(theta.detach(), bound, max_bits), packed)
        return frozen

    @property
    def bits(self) -> Tensor:
        """uint8: how many leading bits of each value are frozen."""
        return (self.packed & BITS_MASK).to(torch.uint8)

    @property
    def code(self) -> Tensor:
        """int32: each value's anchor, as a code on the grid of N bits."""
        if self.checksum is not None:
            raise ValueError("The state was restored without its parameter: call locate(theta) first")
        return self.packed >> BITS_FIELD

    @property
    def information(self) -> Tensor:
        """float32: I, the information that all tasks gave, in units of the prior."""
        return stored_information(self.gained)

    @information.setter
    def information(self, value: Tensor) -> None:
        self.gained = store_information(value.to(torch.float32))

    @property
    def precision(self) -> Tensor:
        """float32: S_t = S_0·(1 + I), the posterior precision of the exact rule."""
        return self.prior * (1.0 + self.information)

    def anchor(self, dtype: torch.dtype) -> Tensor:
        """θ*, the values right after the last boundary; in the strict cell to 1/256 of the cell."""
        return decode(self.code, self.bound, self.max_bits, dtype)

    def predicted_forgetting(self, theta: Tensor) -> Tensor:
        """½·Σ (S − S_0)·(θ − θ*)²/t: what values cost the tasks learned, on average, in nats a sample."""
        drift = theta - self.anchor(theta.dtype)
        return 0.5 * self.prior * (self.information * drift.square()).sum() / max(self.tasks, 1)

    def limits(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The lowest and the highest value that the frozen bits allow."""
        low, high = cell_codes(self.code, self.bits, self.max_bits, self.cell)
        return (
            decode(low, self.bound, self.max_bits, dtype),
            decode(high, self.bound, self.max_bits, dtype),
        )

    def frozen_code(self, theta: Tensor) -> Tensor:
        """The frozen leading bits as read back from the values themselves.

        They are ⌊(θ/B + ⅓)·2^bits⌋ in the strict cell, ⌊θ/B·2^bits⌋ in the paper's, and 0 where bits = 0.
        """
        bits = self.bits.to(torch.int32)
        code = encode(theta.detach(), self.bound, self.max_bits)
        if self.cell == "strict":
            code = code + 2**self.max_bits // 3
        return (code >> (self.max_bits - bits)).masked_fill(bits == 0, 0)

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
        self._anchor_at(code, bits.to(torch.int32))
        self.tasks += 1
        self.total = 0
        theta.copy_(decode(code, self.bound, self.max_bits, theta.dtype))

    def locate(self, theta: Tensor) -> None:
        """Completes a restored state with the frozen bits, which stand in the parameter itself.

        Args:
            theta: The parameter, as it was when the state was saved.

        Raises:
            ValueError: If it is another.
        """
        if self.checksum is None:
            return
        free, zero = self._free_bits, self._place_of_zero
        code = encode(theta.detach().to(self.packed.device), self.bound, self.max_bits) + zero
        if _checksum(code >> free) != self.checksum:
            raise ValueError(
                "The parameter's frozen bits are not those that were saved with its state: load the module's "
                "weights from the same checkpoint first"
            )
        self.packed = self.packed + (((code >> free << free) - zero) << BITS_FIELD)
        self.checksum = None

    def to(self, device: torch.device) -> FrozenBits:
        """The same state on a device."""
        return replace(self, packed=self.packed.to(device), gained=self.gained.to(device))

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to restore it exactly, in the strict cell together with its parameter."""
        state = dict(vars(self))
        if self.cell == "paper":
            return state
        del state["packed"]
        bits, free = self.bits, self._free_bits
        derived = torch.equal(bits, exact_bits(self.precision, self.prior, self.max_bits))
        code = self._counted_code
        return {
            **state,
            "bits": None if derived else bits,
            "position": ((code & ~(-1 << free)) >> _rest(free)).to(torch.uint8),
            "checksum": _checksum(code >> free) if self.checksum is None else self.checksum,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> FrozenBits:
        """Restores what :meth:`state_dict` saved, exactly.

        Bits and information are there at once; in the strict cell the rest awaits :meth:`locate`.

        Raises:
            ValueError: If it is not what :meth:`state_dict` gives.
        """
        _check_saved(state)
        if state["cell"] == "paper":
            return cls(**state)
        position, bits = state["position"], state["bits"]
        state = {name: value for name, value in state.items() if name not in ("position", "bits")}
        frozen = cls(packed=position, **state)
        if bits is None:
            bits = exact_bits(frozen.precision, frozen.prior, frozen.max_bits)
        rest = _rest(_free_bits(bits.to(torch.int32), frozen.max_bits))
        frozen.packed = (_middle(position.to(torch.int32) << rest, rest) << BITS_FIELD) | bits.to(torch.int32)
        return frozen

    @property
    def _free_bits(self) -> Tensor:
        return _free_bits(self.packed & BITS_MASK, self.max_bits)

    @property
    def _place_of_zero(self) -> Tensor:
        return _place_of_zero(self.packed & BITS_MASK, self.max_bits)

    @property
    def _counted_code(self) -> Tensor:
        """The code counted as cells are, without a sign; the frozen bits are 0 while unknown."""
        code = self.packed >> BITS_FIELD
        return code + self._place_of_zero if self.checksum is None else code

    def _anchor_at(self, code: Tensor, bits: Tensor) -> None:
        if self.cell == "strict":
            zero = _place_of_zero(bits, self.max_bits)
            code = _middle(code + zero, _rest(_free_bits(bits, self.max_bits))) - zero
        self.packed = (code << BITS_FIELD) | bits


def _rest(free: Tensor) -> Tensor:
    """How many of an anchor's free bits are not kept."""
    return (free - _BITS_BEHIND).clamp(min=0)


def _middle(code: Tensor, rest: Tensor) -> Tensor:
    """The codes with their last bits replaced by the middle of what these can be."""
    return (code >> rest << rest) + (1 << rest >> 1)


def check_numbers(state: dict[str, Any]) -> None:
    """Refuses what cannot be the numbers of a saved state, of a parameter or a layer.

    Args:
        state: What was saved.

    Raises:
        ValueError: If it cannot; it names the number.

    Example:
        >>> check_numbers(FrozenBits.of(torch.zeros(2), bound=1.0, prior=1e-6).state_dict())
    """
    for name in ("prior", "bound"):
        check_number(state, name, torch.finfo(torch.float32).tiny)
    for name in ("tasks", "total", "steps", "rate"):
        check_number(state, name, 0)
    check_number(state, "max_bits", 1, LARGEST_MAX_BITS)


def _check_saved(state: dict[str, Any]) -> None:
    shape = state["gained"].shape
    check_tensor(state, "gained", [torch.float16], shape)
    check_numbers(state)
    if state["cell"] == "paper":
        check_tensor(state, "packed", [torch.int32], shape)
        return
    check_tensor(state, "position", [torch.uint8], shape)
    check_number(state, "checksum", -(2**63))
    if state["bits"] is not None:
        check_tensor(state, "bits", [torch.uint8], shape)
        if (state["bits"] > state["max_bits"]).any():
            raise ValueError(f"bits has more than max_bits={state['max_bits']}")


def _checksum(leading: Tensor) -> int:
    """A number that tells apart leading codes that differ in any value, or in its place."""
    total = 0
    for start, part in enumerate(leading.reshape(-1).split(_CHECKED_AT_ONCE)):
        place = torch.arange(1, len(part) + 1, device=part.device)
        total += (start + 1) * int((part * place).sum())
    return total % 2**61
