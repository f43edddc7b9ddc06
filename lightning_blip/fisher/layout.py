"""Where the samples of a batch are in a tensor, and how to find out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_blip.fisher.rounding import ROUNDING


@dataclass(frozen=True)
class Layout:
    """The position of the samples: the outer or the inner part of one dimension.

    In most layers dimension 0 is the batch. Where sequences come first, it is dimension 1. Where positions or
    windows of an image are treated as samples, each sample has several places along the dimension.

    Attributes:
        dim: The dimension that holds the samples.
        outer: Whether the samples are the outer part of the dimension, so that the places of one sample are
            neighbours; otherwise they are the inner part.
    """

    dim: int
    outer: bool = True

    def fits(self, shape: Sequence[int], count: int) -> bool:
        """Return whether a tensor of this shape can hold ``count`` samples in this layout."""
        return self.dim < len(shape) and shape[self.dim] % count == 0

    def samples_first(self, tensor: Tensor, count: int) -> Tensor:
        """Return ``tensor`` with its ``count`` samples in a new dimension 0."""
        places = tensor.shape[self.dim] // count
        sizes = (count, places) if self.outer else (places, count)
        divided: Tensor = tensor.unflatten(self.dim, sizes)
        return divided.movedim(self.dim if self.outer else self.dim + 1, 0)


#: The layout of a single sample: the whole tensor belongs to it.
SINGLE_SAMPLE = Layout(0)


def find_layouts(grad: Tensor, count: int) -> Iterator[Layout]:
    """Yield the layouts in which the first sample has no gradient in the places of the others.

    Args:
        grad: The gradient of the first sample's log-probability.
        count: The number of samples that the tensor holds.
    """
    for dim in range(grad.ndim):
        for layout in (Layout(dim), Layout(dim, outer=False)):
            if layout.fits(grad.shape, count):
                by_sample = layout.samples_first(grad, count).flatten(1).abs().amax(1)
                first, *others = by_sample.tolist()
                if all(other <= ROUNDING * first for other in others):
                    yield layout
