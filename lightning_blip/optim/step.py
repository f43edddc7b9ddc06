"""What frozen bits do to a step that an optimizer has taken: one function of tensors, in one pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_blip.frozen.diagonal import (
    BITS_FIELD,
    BITS_MASK,
    Cell,
    FrozenBits,
    cell_codes,
    stored_information,
)

#: So many values at a time leave the temporaries of each operation in the cache. Where there are more of them
#: in all, a few thousand steps of a compiled function save more than the seconds that compiling takes.
CHUNK = 2**18
#: Up to this size it is calls that cost, not values, and to join parameters costs as much as so many calls.
SMALL = 2**13
CALLS = 5
_DIGITS = [1 << digit for digit in range(BITS_FIELD)]


class Values(NamedTuple):
    """The tensors of one parameter's shape that a step reads, the first of which it writes."""

    theta: Tensor
    packed: Tensor
    gained: Tensor | None
    update: Tensor | None
    divisor: Tensor | None

    def each(self, function: Callable[[Tensor], Tensor]) -> Values:
        """Those that there are, each put through a function."""
        theta, packed, *others = self
        return Values(
            function(theta), function(packed), *(None if one is None else function(one) for one in others)
        )


@dataclass(eq=False)
class Step:
    """A step that was taken, and what holds it back.

    Attributes:
        theta: The parameter after the step −factor·update.
        frozen: Its frozen state.
        update: None if there was no step, or it is not to be scaled.
        factor: See above.
        pull: η·λ, the learning rate times the strength of the pull; 0 for none.
        divisor: P, what the optimizer divided gradients by; None for 1.
        seldom: Whether there are so few such steps that no function is compiled for them.
    """

    theta: Tensor
    frozen: FrozenBits
    update: Tensor | None
    factor: float
    pull: float
    divisor: Tensor | None = None
    seldom: bool = False

    @property
    def values(self) -> Values:
        """What differs from value to value."""
        gained = self.frozen.gained if self.pull else None
        return Values(self.theta.detach(), self.frozen.packed, gained, self.update, self.divisor)

    @property
    def constants(self) -> list[float]:
        """What does not: the factor, 1/(η·λ·S_0) and B·2^−N."""
        strength = self.pull * self.frozen.prior
        # Never 0, which zero information could not be divided by.
        slack = max(1.0 / strength, 1e-30) if strength else 1.0
        return [self.factor, slack, self.frozen.bound / 2.0**self.frozen.max_bits]

    @property
    def kind(self) -> Hashable:
        """What is the same in steps that can be held back together."""
        return (
            self.theta.device,
            self.theta.dtype,
            self.frozen.max_bits,
            self.frozen.cell,
            self.update is None,
            self.pull == 0,
            self.divisor is None,
            self.seldom,
        )


def hold_back(
    values: Values, kept: Tensor | None, constants: Sequence[Tensor], max_bits: int, cell: Cell
) -> None:
    """Scales a step that was taken, pulls and projects; see :class:`FrozenBitsOptimizer`.

    All of it is arithmetic of integers, or single IEEE operations in θ's dtype: the result is the same bit
    for bit whether they run one by one or compiled into one loop.

    Args:
        values: The parameter after the step −factor·update, moved in place; its state; the update; P.
        kept: 2^(−p·bits), the share of the update that is left; None if there is no update.
        constants: The factor, 1/(η·λ·S_0) and B·2^−N: numbers, or one for each value.
        max_bits: N.
        cell: ``"strict"`` or ``"paper"``.

    Example:
        >>> theta, update = torch.tensor([0.3, -0.6]), torch.tensor([0.1, 0.1])
        >>> frozen = FrozenBits.of(theta, bound=1.0, prior=1.0)
        >>> frozen.freeze(theta, bits=torch.tensor([2, 0]), keep_free_bits=True)
        >>> theta -= update
        >>> constants = torch.tensor([1.0, 1.0, 2.0**-20])
        >>> values = Values(theta, frozen.packed, None, update, None)
        >>> hold_back(values, torch.tensor([0.25, 1.0]), constants, max_bits=20, cell="strict")
        >>> theta
        tensor([ 0.2750, -0.7000])
    """
    theta, packed, gained, update, divisor = values
    factor, slack, grid = constants
    code = packed >> BITS_FIELD
    value = theta
    if update is not None and kept is not None:
        value = value + (1 - kept) * (update * factor)
    if gained is not None:
        information = stored_information(gained, theta.dtype)
        # s/(1 + s) of the way to the anchor, where s = ηλ(S_t − S_0)/P.
        share = information / (information + (slack if divisor is None else slack * divisor))
        value = value + (code.to(theta.dtype) * grid - value) * share
    low, high = cell_codes(code, packed & BITS_MASK, max_bits, cell)
    value = torch.maximum(value, low.to(theta.dtype) * grid)
    theta.copy_(torch.minimum(value, high.to(theta.dtype) * grid))


def hold_back_all(steps: Iterable[Step], scale: float) -> None:
    """Holds back steps: those of few values all together, else a compiled loop over each large parameter.

    Args:
        steps: The steps, one a parameter.
        scale: p.
    """
    alike: dict[Hashable, list[Step]] = {}
    for step in steps:
        alike.setdefault(step.kind, []).append(step)
    few = sum(step.theta.numel() for step in chain(*alike.values())) <= CHUNK
    for group in alike.values():
        small = [step for step in group if few or step.theta.numel() <= SMALL]
        if few or len(small) > CALLS:
            _together(small, scale)
            group = [step for step in group if step not in small]
        for step, constants in zip(group, _constants(group, scale), strict=True):
            _alone(step, constants, scale)


def _together(steps: list[Step], scale: float) -> None:
    """Steps of one kind, joined to one."""
    values = [step.values for step in steps]
    sizes = [one.theta.numel() for one in values]
    joined = Values(*(_cat(parts) for parts in zip(*values, strict=True)))  # type: ignore[arg-type]
    rows = _constants(steps, scale)[:, :3, None]
    each = torch.cat([row.expand(3, size) for row, size in zip(rows, sizes, strict=True)], dim=1)
    _eagerly(joined, tuple(each), scale, steps[0].frozen.max_bits, steps[0].frozen.cell)
    for one, theta in zip(values, joined.theta.split(sizes), strict=True):
        one.theta.copy_(theta.view(one.theta.shape))


def _cat(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part.reshape(-1) for part in parts if part is not None]
    return torch.cat(present) if present else None


def _alone(step: Step, constants: Tensor, scale: float) -> None:
    values, max_bits, cell = _flat(step.values), step.frozen.max_bits, step.frozen.cell
    if not step.seldom and _compiled(values, constants, max_bits, cell):
        return
    starts = range(0, len(values.theta), CHUNK) if values.theta.ndim == 1 else ()
    chunks = [values.each(itemgetter(slice(start, start + CHUNK))) for start in starts]
    for chunk in chunks or [values]:
        _eagerly(chunk, tuple(constants[:3]), scale, max_bits, cell)


def _constants(steps: list[Step], scale: float) -> Tensor:
    """A row for each step: its constants, and the powers that make 2^(−p·bits)."""
    powers = _powers(scale)
    rows = [[*step.constants, *powers] for step in steps]
    return steps[0].theta.new_tensor(rows) if steps else torch.empty(0)


def _powers(scale: float) -> list[float]:
    """2^−p, 2^−2p, 2^−4p, …: one for each binary digit of a number of bits."""
    return [2.0 ** (-scale * digit) for digit in _DIGITS]


def _power(bits: Tensor, powers: Sequence[Tensor]) -> Tensor:
    """2^(−p·bits), as the product over the binary digits of ``bits``: rounded the same way everywhere."""
    power = torch.where(bits & 1 == 0, 1.0, powers[0])
    for digit, factor in zip(_DIGITS[1:], powers[1:], strict=True):
        power = power * torch.where(bits & digit == 0, 1.0, factor)
    return power


@cache
def _every_power(scale: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """2^(−p·bits) for all the few bits that there can be: a look-up is one operation."""
    powers = torch.tensor(_powers(scale), dtype=dtype, device=device)
    return _power(torch.arange(BITS_MASK + 1, device=device), tuple(powers))


def _eagerly(values: Values, constants: Sequence[Tensor], scale: float, max_bits: int, cell: Cell) -> None:
    kept = None
    if values.update is not None:
        bits = values.packed & BITS_MASK
        every = _every_power(scale, values.theta.dtype, values.theta.device)
        kept = every.index_select(0, bits.reshape(-1)).view(bits.shape)
    hold_back(values, kept, constants, max_bits, cell)


def _flat(values: Values) -> Values:
    """The same values as vectors, if they lie in memory in the same order without gaps, else as they are."""
    if all(tensor is None or tensor.is_contiguous() for tensor in values):
        return values.each(_vector)
    order = sorted(range(values.theta.ndim), key=values.theta.stride, reverse=True)
    ordered = values.each(lambda tensor: tensor.permute(order))
    if all(tensor is None or tensor.is_contiguous() for tensor in ordered):
        return ordered.each(_vector)
    return values


def _vector(tensor: Tensor) -> Tensor:
    return tensor.view(-1)


def _fused(
    theta: Tensor,
    packed: Tensor,
    gained: Tensor | None,
    update: Tensor | None,
    divisor: Tensor | None,
    constants: Tensor,
    max_bits: str,
    cell: Cell,
) -> None:
    # Codes come as patterns of float32, vectors of which Inductor loads several times faster, and N as text,
    # which is a constant to it: powers of a variable are of floating point on a GPU.
    values = Values(theta, packed.view(torch.int32), gained, update, divisor)
    factor, slack, grid, *powers = constants
    kept = None if values.update is None else _power(values.packed & BITS_MASK, powers)
    hold_back(values, kept, (factor, slack, grid), int(max_bits), cell)


class _Compiled:
    """:func:`_fused`, compiled when first needed; once for all sizes, learning rates and bounds."""

    def __init__(self) -> None:
        self._function: Callable[..., None] | None = None
        self._works = True

    def __call__(self, values: Values, constants: Tensor, max_bits: int, cell: Cell) -> bool:
        """Holds a step back, unless it cannot; tells whether it did."""
        # A vector as short as the constants, or of one value, would be compiled as a case of its own.
        if not self._works or values.theta.ndim != 1 or len(values.theta) <= len(constants):
            return False
        if self._function is None:
            self._function = torch.compile(_fused, dynamic=True)
        try:
            theta, packed, *others = values
            self._function(theta, packed.view(torch.float32), *others, constants, str(max_bits), cell)
        except Exception as error:
            self._works = False
            warnings.warn(
                f"torch.compile does not work here ({error!s:.200}): steps take longer than they need to",
                stacklevel=2,
            )
        return self._works


_compiled = _Compiled()
