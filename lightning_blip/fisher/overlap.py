"""The norm of the whole Fisher information matrix, which shows how far it is from diagonal."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_blip.fisher.gradients import BUDGET_BYTES, SampleGradients

# This number of pairs of samples gives the norm to about 10 %.
_PAIRS = 200_000
_LARGEST_BLOCK = 64


class OverlapObserver:
    """Estimates ‖F‖² of the whole Fisher information matrix F.

    Give it to ``diagonal_fisher`` as one of its ``observers``. F is the mean of g·gᵀ, where g is the gradient
    of a sample, so ‖F‖² = tr(F²) is the mean of (g·g')² over pairs of different samples. The matrix F itself
    is never formed.

    Args:
        largest: The number of elements of the largest parameter; the memory depends on it.

    Attributes:
        names: The names of the parameters whose gradients were received.

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
        self._block = max(2, min(_LARGEST_BLOCK, BUDGET_BYTES // (8 * largest)))
        self._batch: Tensor | float = 0.0
        self._total = 0.0
        self._pairs = 0

    def see(self, name: str, gradients: SampleGradients) -> None:
        """Add one parameter's part to the inner products of the batch."""
        block = min(self._block, gradients.count)
        if block > 1 and self._pairs < _PAIRS:
            self.names.add(name)
            self._batch = self._batch + gradients.inner_products(block)

    def end_batch(self, size: int) -> None:
        """Add the squared inner products of different samples."""
        if isinstance(self._batch, Tensor):
            off_diagonal = self._batch - torch.diag_embed(self._batch.diagonal(dim1=1, dim2=2))
            self._total += float(off_diagonal.double().square().sum())
            blocks, block, _ = self._batch.shape
            self._pairs += blocks * block * (block - 1)
        self._batch = 0.0

    def squared_norm(self) -> float | None:
        """Return ‖F‖² of the parameters in ``names``; None if no batch had two samples."""
        return self._total / self._pairs if self._pairs else None
