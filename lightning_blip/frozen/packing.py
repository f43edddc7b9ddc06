"""How values become integers: codes on the grid, cells of codes, and information in 16 bits."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

CellName = Literal["strict", "paper"]

#: The significand of float32 has 24 bits: a code with up to this many fractional bits survives the way to θ
#: and back.
LARGEST_MAX_BITS = 20
#: The lowest bits of a packed int32 hold the number of frozen bits, the others the anchor's code.
BITS_FIELD = 5
BITS_MASK = (1 << BITS_FIELD) - 1
# The units of store_information below and above the switch.
_SMALL_UNIT, _LARGE_UNIT = 2.0**-6, 2.0**24
_LARGE_FROM = 1023.0
_MOST_INFORMATION = _LARGE_UNIT * torch.finfo(torch.float16).max
# A strict anchor keeps this number of bits behind the frozen ones: they fill one byte.
_BITS_BEHIND = 8
# Chunk size of checksum: the products of codes and positions stay within int64.
_CHECKED_AT_ONCE = 2**16


def bound(theta: Tensor, fan: int | None = None, *, is_bias: bool = False) -> float:
    """Return the bound B of a parameter tensor, whose values are kept in (−B, B).

    Args:
        theta: The parameter's values at the start of training.
        fan: The size of the Linear or Conv layer that owns the parameter, by default its number of inputs;
            None for any other parameter.
        is_bias: Whether the parameter is the bias of such a layer.

    Returns:
        6/√fan for a layer's weight and 1 for its bias. For any other parameter, or where a value already
        lies outside, the smallest power of two that is at least 1 and at least twice the largest |θ|.

    Example:
        >>> bound(torch.zeros(3, 4), fan=4)
        3.0
        >>> bound(torch.tensor([1.0, -2.5]))
        8.0

    Source:
        BLIP (Shi et al., CVPR 2021), section 3.2, for the bound of a layer.
    """
    largest = float(theta.detach().abs().amax()) if theta.numel() else 0.0
    if fan is not None:
        of_layer = 1.0 if is_bias else 6.0 / fan**0.5
        if largest < of_layer:
            return of_layer
    power = 1.0
    while power < 2.0 * largest:
        power *= 2.0
    return power


def encode(theta: Tensor, bound: float, max_bits: int) -> Tensor:
    """Return the nearest code k of each value on the grid k·2^−N·B, |k| < 2^N.

    Args:
        theta: Values, any shape.
        bound: B, in the units of ``theta``.
        max_bits: N, the number of fractional bits of θ/B.

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
    """Return the values k·2^−N·B of codes k; :func:`encode` turns them into the same codes again.

    Example:
        >>> decode(torch.tensor([2, -7]), bound=1.0, max_bits=3)
        tensor([ 0.2500, -0.8750])
    """
    step = bound / float(2**max_bits)
    return code.to(dtype) * step


def encode_leading(theta: Tensor, bits: Tensor, bound: float, max_bits: int) -> Tensor:
    """Return the code of θ rounded to its leading bits: B·round(θ/B·2^bits)/2^bits, and 0 where bits = 0.

    Args:
        theta: Values, any shape.
        bits: The number of leading bits that each value keeps, 0 to N, same shape.
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
    """Return information in 16 bits: a float16 that uses its sign as one more bit of the exponent.

    Information is never negative, so the sign is free. Values below about 2^10 prior precisions are stored
    as positive numbers in units of 2^−6, larger values as negative numbers in units of 2^24. The relative
    error is at most 2^−11 from 2^−20 to 2^40, where the value saturates; the smallest value above 0 is 2^−30.
    Compilers vectorise the arithmetic of :func:`stored_information`, but not bit operations on 16 bits. A
    stored value that is read is stored as the same value again, so information never decreases.

    Example:
        >>> store_information(torch.tensor([0.0, 3.0, 2.0**30]))
        tensor([   0.,  192.,  -64.], dtype=torch.float16)
    """
    large = -(information.clamp(max=_MOST_INFORMATION) / _LARGE_UNIT)
    return torch.where(information < _LARGE_FROM, information / _SMALL_UNIT, large).to(torch.float16)


def stored_information(stored: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the information that :func:`store_information` stored.

    Example:
        >>> stored_information(torch.tensor([0.0, 192.0, -64.0], dtype=torch.float16))
        tensor([0.0000e+00, 3.0000e+00, 1.0737e+09])
    """
    value = stored.to(dtype)
    return torch.where(value < 0, value * -_LARGE_UNIT, value * _SMALL_UNIT)


def free_bits(bits: Tensor, max_bits: int) -> Tensor:
    """Return the number of free bits of each code; the sign counts as one where no bit is frozen.

    Example:
        >>> free_bits(torch.tensor([0, 1, 4]), max_bits=4)
        tensor([5, 3, 0])
    """
    return max_bits - bits + (bits == 0)


def code_of_zero(bits: Tensor, max_bits: int) -> Tensor:
    """Return the offset after which every strict cell begins at a multiple of its width.

    Cells are shifted by a third of B (see :func:`cell_codes`). Where all N + 1 bits are free the only cell
    is the whole interval, which begins at −2^N.

    Example:
        >>> code_of_zero(torch.tensor([0, 2]), max_bits=4)
        tensor([16, 21], dtype=torch.int32)
    """
    third = torch.full_like(bits, 2**max_bits // 3, dtype=torch.int32)
    zero: Tensor = third.masked_fill(bits == 0, 0) + 2**max_bits
    return zero


def cell_codes(code: Tensor, bits: Tensor, max_bits: int, cell: CellName) -> tuple[Tensor, Tensor]:
    """Return the lowest and the highest code that a parameter may take while its leading bits are frozen.

    In the strict cell the code ⌊(θ/B + ⅓)·2^bits⌋ never changes. The shift by a third keeps 0 away from the
    walls of all cells, for any number of bits: without it, one frozen bit would fix the sign of a weight near
    0. In the paper's cell, θ stays within ±B·2^−bits of its anchor. With zero bits the whole interval is
    free; with all N bits nothing is.

    Args:
        code: int32 codes of the anchors on the grid of N bits.
        bits: The number of frozen leading bits of each, 0 to N, same shape.
        max_bits: N.
        cell: ``"strict"`` or ``"paper"``.

    Returns:
        Two int32 tensors, the lowest and the highest code, both included.

    Example:
        >>> cell_codes(torch.tensor([5]), torch.tensor([2]), max_bits=4, cell="strict")
        (tensor([3]), tensor([6]))
        >>> cell_codes(torch.tensor([5]), torch.tensor([2]), max_bits=4, cell="paper")
        (tensor([1]), tensor([9]))
    """
    most = 2**max_bits
    free = free_bits(bits.to(code.dtype), max_bits)
    if cell == "strict":
        leading, zero = -1 << free, code_of_zero(bits, max_bits)
        low = ((code + zero) & leading) - zero
        return low.clamp(min=1 - most), (low + ~leading).clamp(max=most - 1)
    width = (1 << free) & -2  # 0 where no bit is free
    return (code - width).clamp(min=1 - most), (code + width).clamp(max=most - 1)


def dropped_bits(free: Tensor) -> Tensor:
    """Return the number of the lowest free bits that a strict anchor does not keep.

    Example:
        >>> dropped_bits(torch.tensor([3, 12]))
        tensor([0, 4])
    """
    return (free - _BITS_BEHIND).clamp(min=0)


def middle_of(code: Tensor, dropped: Tensor) -> Tensor:
    """Return the codes with their lowest bits replaced by the middle of their range.

    Example:
        >>> middle_of(torch.tensor([23]), dropped=torch.tensor([3]))
        tensor([20])
    """
    return (code >> dropped << dropped) + (1 << dropped >> 1)


def checksum(leading: Tensor) -> int:
    """Return a number that differs for leading codes that differ in any value, or in its position.

    Example:
        >>> checksum(torch.tensor([1, 2])) == checksum(torch.tensor([2, 1]))
        False
    """
    total = 0
    for start, part in enumerate(leading.reshape(-1).split(_CHECKED_AT_ONCE)):
        place = torch.arange(1, len(part) + 1, device=part.device)
        total += (start + 1) * int((part * place).sum())
    return total % 2**61
