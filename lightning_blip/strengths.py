"""What BLIP chooses by itself where the user does not: prior, pull and damping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_blip.frozen.diagonal import exact_bits

# Of all bits, so many may be frozen after the expected number of tasks.
_SHARE = 0.002
_HALVINGS = 24
# See choose_pull and choose_damping.
_SHARE_ALONG = 1 / 30
_AT_RANK_ONE = 12.0
#: λ where the curvature is known up to a factor near 1, as in the Kronecker basis, or is not known at all:
#: above 1, for the loss rises faster away from θ* than its curvature there tells.
KRONECKER_PULL = 3.0
#: δ in the same cases.
KRONECKER_DAMPING = 0.2


@dataclass
class Measured:
    """What the first task told about a parameter, or about the coordinates of a layer.

    Attributes:
        information: F_1, any shape.
        unit: What a prior of 1 is for it: the layer's fan.
        bound: B.
    """

    information: Tensor
    unit: float
    bound: float


def choose_prior(
    measured: Sequence[Measured],
    max_bits: int,
    expected_tasks: int,
    forgetting_budget: float | None = None,
) -> float:
    """The prior F_0 that leaves enough free for the tasks to come.

    Without a budget: the smallest prior with which, after as many tasks as expected, each telling as much as
    the first, one bit in 500 would be frozen. So it goes with the scale of the information,
    whatever the network, batch or data; the pull remembers, the frozen bits are the last resort.

    With one, in nats: a parameter of precision S is left the cell w = B·2^−bits, in which a uniformly drawn
    value costs ½·(S − S_0)·w²/3 on average, by the second-order expansion of the past tasks' loss. Summed
    over all that is known it is what the frozen bits alone allow to be forgotten, and the prior is the
    largest that keeps it below the budget times the number of tasks.

    Args:
        measured: Of everything tracked.
        max_bits: N.
        expected_tasks: How many there will be.
        forgetting_budget: What may be forgotten of a task, in nats a sample; None for no such bound.

    Returns:
        F_0.

    Example:
        >>> one = Measured(torch.logspace(-6, 0, 1000), unit=1.0, bound=1.0)
        >>> prior = choose_prior([one], max_bits=20, expected_tasks=10)
        >>> twice = Measured(2 * one.information, unit=1.0, bound=1.0)
        >>> round(choose_prior([twice], max_bits=20, expected_tasks=10) / prior, 3)
        2.0
    """

    def bits(one: Measured, prior: float) -> Tensor:
        S_0 = prior * one.unit
        return exact_bits(S_0 + expected_tasks * one.information, S_0, max_bits)

    def used(prior: float) -> float:
        return sum(float(bits(one, prior).sum()) for one in measured)

    def allowed(prior: float) -> float:
        widths = ((one, one.bound * torch.exp2(-bits(one, prior).float())) for one in measured)
        return sum(float((one.information * w.square()).sum()) for one, w in widths) / 6

    def too_small(prior: float) -> bool:
        if forgetting_budget is not None:
            return allowed(prior) < forgetting_budget
        return used(prior) > _SHARE * max_bits * sum(one.information.numel() for one in measured)

    low, high = -100.0, 60.0  # powers of two
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if too_small(2.0**middle) else (low, middle)
    return float(2.0**high)


def choose_pull(squared_norm: float, squared_diagonal: float) -> float:
    """The strength λ of the pull in the diagonal basis.

    A step Δ costs the task ½·Δᵀ·F·Δ. Along the gradients that training follows this is far more than the
    diagonal tells, ½·Σ F_ii·Δ_i²: with Δ_i² in proportion to F_ii the ratio of the two is
    tr(F²)/Σ F_ii² = ‖F‖²/‖diag F‖². Training follows them a small part of the way, most of it to and fro: a
    thirtieth of the ratio keeps both streams of benchmarks/ABLATIONS.md near their best, although these
    ratios are about 330 and 3,200. In the Kronecker basis, where ‖F‖ is met to within a factor of two, a
    constant does.

    Args:
        squared_norm: ‖F‖² of the first task.
        squared_diagonal: Σ F_ii² over the same parameters.

    Returns:
        λ.

    Example:
        >>> choose_pull(squared_norm=3_000.0, squared_diagonal=10.0)
        10.0
    """
    return max(KRONECKER_PULL, _SHARE_ALONG * squared_norm / squared_diagonal)


def choose_damping(squared_norm: float, trace: float) -> float:
    """The damping δ: how much of a layer's information counts for all its outputs alike.

    r = (tr F)²/‖F‖² is the effective rank of the Fisher information. The smaller it is, the fewer directions
    the task has told about, and the farther training will go in the others, where the expansion around θ*
    does not reach: outputs that had no gradient will have one. So each input's information, averaged over
    the outputs, is added δ = 12/r² times.

    Args:
        squared_norm: ‖F‖² of the first task.
        trace: tr F over the same parameters.

    Returns:
        δ.

    Example:
        >>> choose_damping(squared_norm=100.0, trace=20.0)
        0.75
    """
    return _AT_RANK_ONE * (squared_norm / trace**2) ** 2
