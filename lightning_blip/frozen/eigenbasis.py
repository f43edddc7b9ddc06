"""Eigenvectors and eigenvalues of a sum of matrices that grows task by task."""

from __future__ import annotations

import torch
from torch import Tensor


def add_factor(
    basis: Tensor, values: Tensor, rest: float, factor: Tensor, rank: int | None
) -> tuple[Tensor, Tensor, float]:
    """Return the eigenvectors and eigenvalues of a known matrix plus a new factor, the largest first.

    Args:
        basis: The kept eigenvectors of the known matrix, (n, k).
        values: Their eigenvalues, (k,).
        rest: The eigenvalue that all other directions of the known matrix share.
        factor: The matrix to add, (n, n), symmetric and without negative eigenvalues.
        rank: The number of directions to keep; None for all.

    Returns:
        The kept eigenvectors and eigenvalues of the sum, and the mean of the eigenvalues that are dropped.

    Example:
        >>> nothing = torch.zeros(2, 0), torch.zeros(0), 0.0
        >>> basis, values, rest = add_factor(*nothing, torch.diag(torch.tensor([1.0, 4.0])), rank=1)
        >>> values, rest
        (tensor([4.]), 1.0)
    """
    old = basis.double()
    total = old * (values.double() - rest) @ old.T + factor.double()
    total.diagonal().add_(rest)
    found, vectors = torch.linalg.eigh(total)
    largest_first = found.flip(0).clamp(min=0)
    kept, left = largest_first[:rank], largest_first[rank or len(found) :]
    return vectors.flip(1)[:, :rank].to(basis), kept.to(basis), float(left.mean()) if len(left) else 0.0


def diagonal_in(basis: Tensor, values: Tensor, rest: float, new_basis: Tensor) -> Tensor:
    """Return the diagonal of a known matrix in a new basis.

    Args:
        basis: The kept eigenvectors of the matrix, (n, k).
        values: Their eigenvalues, (k,).
        rest: The eigenvalue that all other directions share.
        new_basis: The new directions, (n, l).

    Returns:
        (l,).

    Example:
        >>> diagonal_in(torch.eye(2), torch.tensor([1.0, 3.0]), 0.0, torch.full((2, 1), 0.5**0.5))
        tensor([2.0000])
    """
    return rest + (new_basis.T @ basis).square() @ (values - rest)
