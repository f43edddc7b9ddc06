"""Where the samples of a batch are in a tensor, and how to tell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

ROUNDING = 1e-6  # of the largest gradient


@dataclass(frozen=True)
class Layout:
    """The samples are the outer, or else the inner part of dimension ``dim``.

    Most layers have the batch first. Where sequences come first it is second; where positions are treated as
    samples of their own, or windows of an image, each sample has several places along the dimension.
    """

    dim: int
    outer: bool = True

    def fits(self, shape: Sequence[int], count: int) -> bool:
        """Whether a tensor of this shape may hold ``count`` samples so."""
        return self.dim < len(shape) and shape[self.dim] % count == 0

    def first(self, tensor: Tensor, count: int) -> Tensor:
        """``tensor`` with its ``count`` samples in a dimension of their own, before all others."""
        each = tensor.shape[self.dim] // count
        sizes = (count, each) if self.outer else (each, count)
        divided: Tensor = tensor.unflatten(self.dim, sizes)
        return divided.movedim(self.dim if self.outer else self.dim + 1, 0)


#: For a sample that is alone: all of a tensor is its own.
ALONE = Layout(0)


def layouts_of(grad: Tensor, count: int) -> Iterator[Layout]:
    """The layouts in which the first of ``count`` samples has no gradient at the places of others.

    Args:
        grad: The gradient of the first sample's log-probability.
        count: How many samples the tensor holds.
    """
    for dim in range(grad.ndim):
        for layout in (Layout(dim), Layout(dim, outer=False)):
            if layout.fits(grad.shape, count):
                first, *others = layout.first(grad, count).flatten(1).abs().amax(1).tolist()
                if all(other <= ROUNDING * first for other in others):
                    yield layout
