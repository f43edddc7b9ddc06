"""How far the Fisher information is from diagonal, and from all directions alike."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_blip.fisher.gradients import BUDGET_BYTES, SampleGradients

# So many pairs of samples tell the norm to about a tenth.
_PAIRS = 200_000
_MOST_NEIGHBOURS = 64


class OverlapObserver:
    """Estimates ‖F‖² of the whole Fisher information matrix, as one of ``diagonal_fisher``'s ``observers``.

    F is the mean of g·gᵀ, g the gradient of a sample, so ‖F‖² = tr(F²) is the mean of (g·g')² over pairs of
    different samples. The matrix itself, of parameters squared, is never formed.

    Args:
        largest: The number of elements of the largest parameter, which the memory depends on.

    Attributes:
        names: The parameters that were seen.

    Example:
        >>> from lightning_blip.fisher import diagonal_fisher
        >>> layer = torch.nn.Linear(2, 1, bias=False)  # a Gaussian around w·x has the information x·xᵀ
        >>> observer = OverlapObserver(largest=2)
        >>> inputs = torch.ones(4_000, 2)
        >>> fisher = diagonal_fisher(layer, [(inputs, None)], "gaussian", observers=[observer])
        >>> abs(observer.squared_norm() - 4.0) < 0.4
        True
    """

    def __init__(self, largest: int) -> None:
        self.names: set[str] = set()
        self._block = max(2, min(_MOST_NEIGHBOURS, BUDGET_BYTES // (8 * largest)))
        self._batch: Tensor | float = 0.0
        self._total = 0.0
        self._pairs = 0

    def see(self, name: str, gradients: SampleGradients) -> None:
        """Adds a parameter's part to the inner products of the batch."""
        block = min(self._block, gradients.count)
        if block > 1 and self._pairs < _PAIRS:
            self.names.add(name)
            self._batch = self._batch + gradients.overlaps(block)

    def end_batch(self, size: int) -> None:
        """Squares the inner products of different samples."""
        if isinstance(self._batch, Tensor):
            off_diagonal = self._batch - torch.diag_embed(self._batch.diagonal(dim1=1, dim2=2))
            self._total += float(off_diagonal.double().square().sum())
            blocks, block, _ = self._batch.shape
            self._pairs += blocks * block * (block - 1)
        self._batch = 0.0

    def squared_norm(self) -> float | None:
        """‖F‖², of the parameters that were seen; None where no batch had two samples."""
        return self._total / self._pairs if self._pairs else None
