"""From the Fisher information of a task to its information gain, and from the gain to frozen bits."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_blip.frozen.diagonal import FrozenBits, exact_bits

Rule = Literal["exact", "paper"]


def add_precision(precision: Tensor, fisher: Tensor) -> Tensor:
    """The exact rule's posterior precision S_t = S_{t−1} + F_t, both in the same unit.

    Example:
        >>> add_precision(torch.tensor([1.0]), torch.tensor([3.0]))
        tensor([4.])
    """
    return precision + fisher


def average_fisher(average: Tensor, fisher: Tensor, task: int) -> Tensor:
    """The paper's running mean F_{0:t} = (F_t + t·F_{0:t−1})/(t + 1), the prior counted as one task.

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


def information_gain(after: Tensor, before: Tensor) -> Tensor:
    """The information gain ½·log2(after/before) of each value, in bits.

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


def paper_bits(bits: Tensor, gain: Tensor, max_bits: int) -> Tensor:
    """The bits that the paper's rule freezes: min(N, bits + max(0, ⌈IG_t⌉)).

    Example:
        >>> paper_bits(torch.tensor([3, 19], dtype=torch.uint8), torch.tensor([-0.5, 1.2]), max_bits=20)
        tensor([ 3, 20], dtype=torch.uint8)

    Source:
        BLIP (Shi et al., CVPR 2021), section 3.3.
    """
    added = gain.ceil().clamp(0, max_bits)
    return (bits + added).clamp(max=max_bits).to(torch.uint8)


def rule_precision(frozen: FrozenBits, rule: Rule) -> Tensor:
    """What a rule goes by: S_t, or the paper's F_{0:t}, which is S_t/(t + 1).

    Example:
        >>> frozen = FrozenBits.of(torch.zeros(1), bound=1.0, prior=8.0)
        >>> frozen.tasks = 3
        >>> rule_precision(frozen, "exact"), rule_precision(frozen, "paper")
        (tensor([8.]), tensor([2.]))
    """
    return frozen.precision if rule == "exact" else frozen.precision / (frozen.tasks + 1)


@torch.no_grad()
def consolidate(theta: Tensor, frozen: FrozenBits, fisher: Tensor, rule: Rule) -> Tensor:
    """Adds what a task told about a parameter to its frozen state, and freezes the bits that this fixes.

    Args:
        theta: The parameter, moved in place onto the grid (see :meth:`FrozenBits.freeze`).
        frozen: Its state, brought up to date in place.
        fisher: F_t, the diagonal Fisher information of the task, same shape as ``theta``.
        rule: ``"exact"`` (posterior precision, free bits stay) or ``"paper"`` (running mean, ``theta``
            rounded to its frozen bits).

    Returns:
        The task's information gain, in bits, same shape.

    Example:
        >>> theta = torch.tensor([0.3, -0.6])
        >>> frozen = FrozenBits.of(theta, bound=1.0, prior=1.0)
        >>> consolidate(theta, frozen, fisher=torch.tensor([15.0, 0.0]), rule="exact")
        tensor([2., 0.])
        >>> frozen.bits
        tensor([2, 0], dtype=torch.uint8)
    """
    before = rule_precision(frozen, rule)
    fisher = fisher.to(before)
    frozen.information = add_precision(frozen.information, fisher / frozen.prior)
    if rule == "exact":
        after = frozen.precision
        # From the precision as it is kept, so that a checkpoint need not hold the bits.
        bits = exact_bits(after, frozen.prior, frozen.max_bits)
    else:
        after = average_fisher(before, fisher, frozen.tasks + 1)
        bits = paper_bits(frozen.bits, information_gain(after, before), frozen.max_bits)
    frozen.freeze(theta, bits, keep_free_bits=rule == "exact")
    return information_gain(after, before)
