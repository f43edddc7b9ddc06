"""Prior, pull and damping, chosen from the first task's Fisher information where the user gives none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_blip.frozen.gains import exact_bits

# The share of all bits that may be frozen after the expected number of tasks.
_SHARE = 0.002
_HALVINGS = 24
# See choose_pull and choose_damping.
_SHARE_ALONG = 1 / 30
_AT_RANK_ONE = 12.0
#: λ where the curvature is met to within a factor of two, as in the Kronecker basis, or is not measured:
#: above 1, because the loss rises faster away from θ* than its curvature there predicts.
KRONECKER_PULL = 3.0
#: δ in the same cases.
KRONECKER_DAMPING = 0.2


@dataclass(frozen=True)
class Measured:
    """The first task's information about one state, as the choice of the prior needs it.

    Attributes:
        information: F_1 of each coordinate, any shape.
        unit: What the prior is multiplied by: the layer's fan, else 1.
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
    """Return the prior F_0 that leaves enough bits free for the expected number of tasks.

    Without a budget it is the smallest prior with which one bit in 500 is frozen after the expected tasks,
    each with the information of the first. It follows the scale of the information, for any network, batch
    size or data. The pull does the remembering; the frozen bits are the last resort.

    With a budget: a parameter of precision S may move within a cell of width w = B·2^−bits. A value drawn
    uniformly from the cell costs ½·(S − S_0)·w²/3 on average, by the second-order expansion of the past
    tasks' loss. The sum over all parameters is the forgetting that the frozen bits alone allow, and the prior
    is the largest that keeps it below the budget times the number of tasks.

    Args:
        measured: The first task's information about every state.
        max_bits: N.
        expected_tasks: The expected number of tasks.
        forgetting_budget: The allowed forgetting per task, in nats per sample; None for a share of the bits.

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
    """Return the strength λ of the pull in the diagonal basis.

    A step Δ costs the task ½·Δᵀ·F·Δ. Along the gradients that training follows this is far more than the
    diagonal predicts, ½·Σ F_ii·Δ_i²: with Δ_i² in proportion to F_ii the ratio of the two is
    tr(F²)/Σ F_ii² = ‖F‖²/‖diag F‖². Training follows the gradients for a small part of the way only; most of
    its steps cancel. A thirtieth of the ratio keeps both streams of benchmarks/ABLATIONS.md near their best,
    although their ratios are about 330 and 3,200. In the Kronecker basis ‖F‖ is met to within a factor of
    two, and a constant is enough.

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
    """Return the damping δ, the part of a layer's information that is spread evenly over its outputs.

    r = (tr F)²/‖F‖² is the effective rank of the Fisher information. The smaller it is, the fewer directions
    the task has information about, and the farther later tasks move in all others, where the expansion around
    θ* does not hold: outputs that had no gradient will have one. So δ = 12/r² times each input's information,
    averaged over the outputs, is added.

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
