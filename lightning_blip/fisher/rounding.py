"""Compare gradients from two computations, up to rounding errors."""

from __future__ import annotations

from torch import Tensor

#: The rounding error of a gradient, relative to the largest gradient.
ROUNDING = 1e-6


def tolerance(tensor: Tensor) -> float:
    """Return the allowed error of ``tensor``, relative to its norm."""
    return 1e-2 if tensor.is_cuda else 1e-3  # TF32 arithmetic on GPUs has 10 bits of mantissa


def agree(found: Tensor, expected: Tensor, largest: float) -> bool:
    """Return whether ``found`` is ``expected`` up to rounding errors.

    Args:
        found: The gradient of one parameter, or its projection.
        expected: The same from another computation.
        largest: The largest norm among the parameters' gradients.
    """
    allowed = tolerance(expected) * expected.norm() + ROUNDING * largest
    return bool((found - expected).norm() <= allowed)
