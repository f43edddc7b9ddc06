"""Scaling, pull and projection of steps in the diagonal basis, for many parameters in few passes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import cache
from operator import itemgetter
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from lightning_blip.frozen.base import Freezing, Step, Stepper
from lightning_blip.frozen.packing import BITS_FIELD, BITS_MASK, CellName, cell_codes, stored_information

#: With this number of values at a time, the temporaries of each operation stay in the cache. Where there are
#: more values in all, compiling a function pays after a few thousand steps.
CHUNK = 2**18
#: Up to this size the cost of a call dominates; to join parameters costs about as much as CALLS calls.
SMALL = 2**13
CALLS = 5
_DIGITS = [1 << digit for digit in range(BITS_FIELD)]


class Packed(Protocol):
    """What this file reads of a diagonal state."""

    packed: Tensor
    gained: Tensor
    prior: float
    bound: float
    freezing: Freezing
    tasks: int

    def limits(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the lowest and the highest value that the frozen bits allow."""


class Values(NamedTuple):
    """The tensors that a step reads, all of one shape; the first one is written."""

    theta: Tensor
    packed: Tensor
    gained: Tensor | None
    update: Tensor | None
    divisor: Tensor | None

    @classmethod
    def of(cls, step: Step) -> Values:
        """Return the tensors of a step."""
        state = _state(step)
        gained = state.gained if step.strength else None
        return cls(step.parameters[0].detach(), state.packed, gained, step.update, step.divisor)

    def each(self, function: Callable[[Tensor], Tensor]) -> Values:
        """Return the tensors after a function was applied to each of them."""
        theta, packed, *others = self
        return Values(
            function(theta), function(packed), *(None if one is None else function(one) for one in others)
        )


class FusedStepper(Stepper):
    """Holds back the steps of all parameters of one optimizer.

    Small networks keep the walls of their cells, 8 bytes per value and 2 MiB at most. Large ones are held
    back by a function that ``torch.compile`` makes at the first step; where it cannot, by the same function
    uncompiled.
    """

    def __init__(self) -> None:
        self._walls: dict[Packed, tuple[int, Tensor, Tensor]] = {}
        self._compiled = Compiled()

    def __call__(self, steps: Iterable[Step], scale: float) -> None:
        """Hold back steps, in place.

        Args:
            steps: One step per parameter.
            scale: p: the update is multiplied by 2^(−p·bits).
        """
        learned = []
        for step in steps:
            if step.state.tasks:
                learned.append(step)
            else:  # only the bound limits the values
                largest = step.state.bound * (1 - 2.0**-step.state.freezing.max_bits)
                step.parameters[0].clamp_(-largest, largest)
        if sum(step.parameters[0].numel() for step in learned) <= CHUNK:
            learned = self._clamp(learned)
        hold_back_all(learned, scale, self._compiled)

    def _clamp(self, steps: Sequence[Step]) -> list[Step]:
        """Project parameters whose step is neither scaled nor pulled, and return the other steps."""
        thetas, lows, highs, others = [], [], [], []
        for step in steps:
            if step.update is not None or step.strength:
                others.append(step)
            else:
                theta = step.parameters[0].detach()
                low, high = self._walls_of(_state(step), theta.dtype)
                thetas.append(theta)
                lows.append(low)
                highs.append(high)
        if thetas:
            torch._foreach_maximum_(thetas, lows)
            torch._foreach_minimum_(thetas, highs)
        return others

    def _walls_of(self, state: Packed, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        known = self._walls.get(state)
        if known is None or known[0] != state.tasks:
            known = self._walls[state] = (state.tasks, *state.limits(dtype))
        return known[1], known[2]


class Compiled:
    """The fused function, compiled once when it is first needed, for all sizes, learning rates and bounds."""

    def __init__(self) -> None:
        self.function: Callable[..., None] | None = None
        self.works = True

    def __call__(self, values: Values, constants: Tensor, max_bits: int, cell: CellName) -> bool:
        """Hold back one step, and return whether it was possible."""
        # A vector of one value, or one no longer than the constants, would be compiled as a case of its own.
        if not self.works or values.theta.ndim != 1 or len(values.theta) <= len(constants):
            return False
        if self.function is None:
            self.function = torch.compile(_fused, dynamic=True)
        try:
            theta, packed, *others = values
            self.function(theta, packed.view(torch.float32), *others, constants, str(max_bits), cell)
        except Exception as error:
            self.works = False
            warnings.warn(
                f"torch.compile does not work here ({error!s:.200}): steps take longer than they need to",
                stacklevel=2,
            )
        return self.works


def hold_back(
    values: Values, kept: Tensor | None, constants: Sequence[Tensor], max_bits: int, cell: CellName
) -> None:
    """Scale a step that was taken, pull and project; see :class:`FrozenBitsOptimizer`.

    All operations are integer arithmetic, or single IEEE operations in θ's dtype: the result is the same bit
    for bit whether they run one by one or compiled into one loop.

    Args:
        values: The parameter after the step −factor·update, changed in place; its state; the update; P.
        kept: 2^(−p·bits), the share of the update that is kept; None if there is no update.
        constants: The factor, 1/(η·λ·S_0) and B·2^−N: numbers, or one per value.
        max_bits: N.
        cell: ``"strict"`` or ``"paper"``.

    Example:
        >>> from lightning_blip.frozen.diagonal import DiagonalState
        >>> theta, update = torch.tensor([0.3, -0.6]), torch.tensor([0.1, 0.1])
        >>> state = DiagonalState.of(theta, bound=1.0, prior=1.0)
        >>> state.freeze(theta, bits=torch.tensor([2, 0]), keep_free_bits=True)
        >>> theta -= update
        >>> constants = torch.tensor([1.0, 1.0, 2.0**-20])
        >>> values = Values(theta, state.packed, None, update, None)
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


def hold_back_all(steps: Iterable[Step], scale: float, compiled: Compiled) -> None:
    """Hold back steps: small ones joined, large ones each in one compiled loop.

    Args:
        steps: The steps, one per parameter.
        scale: p.
        compiled: The function for large parameters.
    """
    alike: dict[Hashable, list[Step]] = {}
    for step in steps:
        alike.setdefault(_kind(step), []).append(step)
    if not alike:
        return
    few = sum(step.parameters[0].numel() for group in alike.values() for step in group) <= CHUNK
    for group in alike.values():
        small = [step for step in group if few or step.parameters[0].numel() <= SMALL]
        if few or len(small) > CALLS:
            _together(small, scale)
            group = [step for step in group if step not in small]
        for step, constants in zip(group, _constants(group, scale), strict=True):
            _alone(step, constants, scale, compiled)


def _state(step: Step) -> Packed:
    return cast(Packed, step.state)


def _kind(step: Step) -> Hashable:
    """Return what steps must share to be held back together."""
    theta, freezing = step.parameters[0], step.state.freezing
    return (
        theta.device,
        theta.dtype,
        freezing.max_bits,
        freezing.cell,
        step.update is None,
        step.strength == 0,
        step.divisor is None,
        step.seldom,
    )


def _together(steps: list[Step], scale: float) -> None:
    """Hold back steps of one kind, joined into one."""
    values = [Values.of(step) for step in steps]
    sizes = [one.theta.numel() for one in values]
    joined = Values(*(_cat(parts) for parts in zip(*values, strict=True)))  # type: ignore[arg-type]
    rows = _constants(steps, scale)[:, :3, None]
    each = torch.cat([row.expand(3, size) for row, size in zip(rows, sizes, strict=True)], dim=1)
    freezing = steps[0].state.freezing
    _eagerly(joined, tuple(each), scale, freezing.max_bits, freezing.cell)
    for one, theta in zip(values, joined.theta.split(sizes), strict=True):
        one.theta.copy_(theta.view(one.theta.shape))


def _cat(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part.reshape(-1) for part in parts if part is not None]
    return torch.cat(present) if present else None


def _alone(step: Step, constants: Tensor, scale: float, compiled: Compiled) -> None:
    values, freezing = _flat(Values.of(step)), step.state.freezing
    if not step.seldom and compiled(values, constants, freezing.max_bits, freezing.cell):
        return
    starts = range(0, len(values.theta), CHUNK) if values.theta.ndim == 1 else ()
    chunks = [values.each(itemgetter(slice(start, start + CHUNK))) for start in starts]
    for chunk in chunks or [values]:
        _eagerly(chunk, tuple(constants[:3]), scale, freezing.max_bits, freezing.cell)


def _constants(steps: list[Step], scale: float) -> Tensor:
    """Return one row per step: the factor, 1/(η·λ·S_0), B·2^−N, and the powers that make 2^(−p·bits)."""
    powers, rows = _powers(scale), []
    for step in steps:
        strength = step.strength * step.state.prior
        # Never 0, because information can be zero and is divided by the sum of both.
        slack = max(1.0 / strength, 1e-30) if strength else 1.0
        grid = step.state.bound / 2.0**step.state.freezing.max_bits
        rows.append([step.factor, slack, grid, *powers])
    return steps[0].parameters[0].new_tensor(rows) if steps else torch.empty(0)


def _powers(scale: float) -> list[float]:
    """Return 2^−p, 2^−2p, 2^−4p, …: one power per binary digit of a number of bits."""
    return [2.0 ** (-scale * digit) for digit in _DIGITS]


def _power(bits: Tensor, powers: Sequence[Tensor]) -> Tensor:
    """Return 2^(−p·bits) as a product over binary digits, which rounds the same way everywhere."""
    power = torch.where(bits & 1 == 0, 1.0, powers[0])
    for digit, factor in zip(_DIGITS[1:], powers[1:], strict=True):
        power = power * torch.where(bits & digit == 0, 1.0, factor)
    return power


@cache
def _every_power(scale: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return 2^(−p·bits) for every possible number of bits: a look-up is one operation."""
    powers = torch.tensor(_powers(scale), dtype=dtype, device=device)
    return _power(torch.arange(BITS_MASK + 1, device=device), tuple(powers))


def _eagerly(
    values: Values, constants: Sequence[Tensor], scale: float, max_bits: int, cell: CellName
) -> None:
    kept = None
    if values.update is not None:
        bits = values.packed & BITS_MASK
        every = _every_power(scale, values.theta.dtype, values.theta.device)
        kept = every.index_select(0, bits.reshape(-1)).view(bits.shape)
    hold_back(values, kept, constants, max_bits, cell)


def _flat(values: Values) -> Values:
    """Return the values as vectors, where all lie in memory in the same order without gaps."""
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
    cell: CellName,
) -> None:
    # Codes are passed as the bit patterns of float32, which Inductor loads several times faster as vectors. N
    # is passed as text, which Inductor takes for a constant: on a GPU, powers of a variable are floating
    # point.
    values = Values(theta, packed.view(torch.int32), gained, update, divisor)
    factor, slack, grid, *powers = constants
    kept = None if values.update is None else _power(values.packed & BITS_MASK, powers)
    hold_back(values, kept, (factor, slack, grid), int(max_bits), cell)
