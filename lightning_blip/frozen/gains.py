"""From the precisions before and after a task to its information gain, and from the gain to frozen bits."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

RuleName = Literal["exact", "paper"]


def average_fisher(average: Tensor, fisher: Tensor, task: int) -> Tensor:
    """Return the paper's running mean F_{0:t} = (F_t + t·F_{0:t−1})/(t + 1); the prior counts as one task.

    Args:
        average: F_{0:t−1}, any shape.
        fisher: F_t, same shape.
        task: t = 1, 2, …

    Returns:
        F_{0:t}.

    Example:
        >>> average_fisher(torch.tensor([1.0]), torch.tensor([4.0]), task=2)
        tensor([2.])

    Source:
        BLIP (Shi et al., CVPR 2021), section 3.3.
    """
    return (fisher + task * average) / (task + 1)


def information_gain(after: Tensor, before: Tensor | float) -> Tensor:
    """Return the information gain ½·log2(after/before) of each value, in bits.

    Args:
        after: Precision (S_t or F_{0:t}) with the task, any shape, positive.
        before: Precision without it.

    Returns:
        Bits, same shape. Negative where the paper's running mean falls.

    Example:
        >>> information_gain(torch.tensor([16.0]), torch.tensor([1.0]))
        tensor([2.])

    Source:
        BLIP (Shi et al., CVPR 2021), section 3.1.
    """
    return 0.5 * torch.log2(after / before)


def exact_bits(precision: Tensor, prior: float, max_bits: int) -> Tensor:
    """Return the bits that the exact rule freezes: ½·log2(S_t/S_0), rounded, N at most.

    The gains of all tasks add up to one logarithm, so nothing is lost to rounding once per task. They are not
    rounded up, as each task's gain is in the paper: any trace of information would freeze one bit, half of
    the parameter's range.

    Example:
        >>> exact_bits(torch.tensor([1.0, 1.9, 2.0, 16.0]), prior=1.0, max_bits=20)
        tensor([0, 0, 1, 2], dtype=torch.uint8)
    """
    # A float32 is stored as its exponent followed by its mantissa. Half of the exponent, rounded, is read off
    # this integer, which gives the same bits on every machine: a checkpoint need not hold them.
    pattern = (precision.to(torch.float32) / prior).view(torch.int32) - (127 << 23)
    return ((pattern + (1 << 23)) >> 24).clamp(0, max_bits).to(torch.uint8)


def paper_bits(bits: Tensor, gain: Tensor, max_bits: int) -> Tensor:
    """Return the bits that the paper's rule freezes: min(N, bits + max(0, ⌈IG_t⌉)).

    Example:
        >>> paper_bits(torch.tensor([3, 19], dtype=torch.uint8), torch.tensor([-0.5, 1.2]), max_bits=20)
        tensor([ 3, 20], dtype=torch.uint8)

    Source:
        BLIP (Shi et al., CVPR 2021), section 3.3.
    """
    added = gain.ceil().clamp(0, max_bits)
    return (bits + added).clamp(max=max_bits).to(torch.uint8)
