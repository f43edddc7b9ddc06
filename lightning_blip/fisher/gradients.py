"""Per-sample gradients, each in the form that is cheapest to square and sum."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

#: The memory that temporaries may take beside the activations of a batch.
BUDGET_BYTES = 256 * 2**20
#: Temporaries of this size fit in the last-level cache of a CPU, and are small enough for the allocator to
#: reuse their memory.
CPU_CHUNK_BYTES = 24 * 2**20
#: To square and add one element takes as long as this number of multiply-adds in a matrix product, as
#: measured on an AVX2 processor.
MULTIPLY_ADDS_PER_SQUARE = 20


def at_least_single(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in its dtype, or in float32 if its dtype is narrower."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def project(tensor: Tensor, direction: Tensor) -> Tensor:
    """Return the product of each row of ``tensor`` with ``direction``; vectors are returned unchanged.

    Args:
        tensor: (rows, ...); all dimensions after the first are flattened.
        direction: (elements per row,).
    """
    return tensor.flatten(1) @ direction.to(tensor.dtype) if tensor.ndim > 1 else tensor


def add_squared_rows(total: Tensor, rows: Tensor) -> None:
    """Add the squares of ``rows``, summed over dimension 0, to ``total``."""
    if total.is_cuda:  # a GPU is limited by the number of kernels, a CPU by memory traffic
        total += rows.square().sum(0)
    else:
        for row in rows:
            total.addcmul_(row, row)


class Observer(Protocol):
    """Receives the per-sample gradients of an estimate, batch by batch."""

    def see(self, name: str, gradients: SampleGradients) -> None:
        """Receive one parameter's gradients for the samples of a batch, if the parameter has a rule."""

    def end_batch(self, size: int) -> None:
        """Finish a batch of ``size`` samples, after ``see`` was called for all its parameters."""


class SampleGradients(ABC):
    """The gradients of ``count`` samples with respect to a tensor of shape ``shape``."""

    count: int
    shape: torch.Size

    @abstractmethod
    def rows(self, samples: slice) -> Tensor:
        """Return the gradients of some samples: (samples, *shape)."""

    def projected_sum(self, direction: Tensor) -> Tensor:
        """Return the sum over samples, projected on ``direction`` (see :func:`project`)."""
        return project(self.rows(slice(None)).sum(0), direction)

    @property
    def row_elements(self) -> int:
        """The number of elements of the temporaries for one row."""
        return 2 * self.shape.numel()

    def add_squares(self, total: Tensor) -> None:
        """Add the squares, summed over samples, to ``total``."""
        for samples in self.chunks(total):
            add_squared_rows(total, self.rows(samples))

    def inner_products(self, block: int) -> Tensor:
        """Return the inner products of the gradients of samples in the same block.

        Args:
            block: The number of consecutive samples in a block; an incomplete last block is left out.

        Returns:
            (blocks, block, block).
        """
        starts = range(0, self.count // block * block, block)
        rows = (self.rows(slice(start, start + block)).reshape(block, -1) for start in starts)
        return torch.stack([part @ part.T for part in rows])

    def chunks(self, total: Tensor, elements: int | None = None) -> Iterator[slice]:
        """Return slices of the samples whose temporaries fit in the memory that they may take.

        Args:
            total: The tensor that is summed into.
            elements: The number of elements of the temporaries for one sample; default, ``row_elements``.
        """
        limit = BUDGET_BYTES // 2 if total.is_cuda else CPU_CHUNK_BYTES
        step = max(1, limit // max(1, (elements or self.row_elements) * total.element_size()))
        return (slice(start, start + step) for start in range(0, self.count, step))


@dataclass
class Dense(SampleGradients):
    """Gradients stored as one tensor (samples, *shape): for small parameters."""

    values: Tensor

    def __post_init__(self) -> None:
        self.count, self.shape = self.values.shape[0], self.values.shape[1:]

    def rows(self, samples: slice) -> Tensor:
        """Return the gradients of some samples."""
        return self.values[samples]

    def add_squares(self, total: Tensor) -> None:
        """Add the squares, summed over samples, to ``total``."""
        total += self.values.square().sum(0)


@dataclass
class Products(SampleGradients):
    """Gradients of linear maps: per sample, a product of two matrices, summed over positions.

    Args:
        left: (samples, groups, m, positions).
        right: Returns (samples, groups, n, positions) for a slice of the samples.
        shape: The parameter's shape; its elements are ordered as (groups, m, n).
    """

    left: Tensor
    right: Callable[[slice], Tensor]
    shape: torch.Size

    def __post_init__(self) -> None:
        self.left = at_least_single(self.left)
        self.count, self.groups, self.m, self.positions = self.left.shape
        self.n = self.shape.numel() // max(1, self.groups * self.m)

    def rows(self, samples: slice) -> Tensor:
        """Return the gradients of some samples."""
        return self._products(samples).reshape(-1, *self.shape)

    def projected_sum(self, direction: Tensor) -> Tensor:
        """Return the projected sum over samples, without forming a gradient."""
        right = direction.to(self.left.dtype) @ self._right(slice(None))
        return (self.left @ right.unsqueeze(-1)).sum(0).flatten()

    @property
    def row_elements(self) -> int:
        """The number of elements of a gradient, and of the ``right`` matrix that it is computed from."""
        return self.shape.numel() + self.groups * self.n * self.positions

    def add_squares(self, total: Tensor) -> None:
        """Add the squares, summed over samples, to ``total``, in the cheapest of three exact ways."""
        matrices = total.view(self.groups, self.m, self.n)
        pairs = self.positions * (self.positions - 1) // 2
        if self.positions == 1:
            # (l·r)² = l²·r², so that one matrix product sums over samples.
            self._add_products(matrices, self.left.square(), self._right(slice(None)).square())
        elif pairs <= MULTIPLY_ADDS_PER_SQUARE:
            for samples in self.chunks(total):
                self._add_gram(matrices, samples)
        else:
            for samples in self.chunks(total):
                add_squared_rows(matrices, self._products(samples))

    def inner_products(self, block: int) -> Tensor:
        """Return the inner products within blocks; with a single position, no gradient is formed."""
        if self.positions > 1:
            return super().inner_products(block)
        kept = slice(self.count // block * block)
        parts = (self.left[kept], self._right(kept))
        left, right = (part.reshape(-1, block, self.groups, part.shape[2]).transpose(1, 2) for part in parts)
        return ((left @ left.mT) * (right @ right.mT)).sum(1)

    def add_factors(self, of_input: Tensor, of_output: Tensor) -> None:
        """Add the Kronecker factors of a map with one group, summed over samples and positions.

        Args:
            of_input: Receives Σ r·rᵀ: (n, n), or (n + 1, n + 1) where a bias adds an input that is always 1.
            of_output: Receives Σ l·lᵀ: (m, m).
        """
        size = (self.m + self.n) * self.positions
        for samples in self.chunks(of_input, size):
            left, right = (
                part.flatten(0, 1).movedim(1, 0).flatten(1)
                for part in (self.left[samples], self._right(samples))
            )
            ones = right.new_ones(len(of_input) - self.n, right.shape[1])
            right = torch.cat([right, ones])
            of_input.addmm_(right, right.T)
            of_output.addmm_(left, left.T)

    def _right(self, samples: slice) -> Tensor:
        return self.right(samples).to(self.left.dtype)

    def _products(self, samples: slice) -> Tensor:
        return self.left[samples] @ self._right(samples).transpose(-1, -2)

    def _add_gram(self, total: Tensor, samples: slice) -> None:
        """Add the squares by (Σ_p l_p·r_p)² = Σ_pq (l_p·l_q)·(r_p·r_q), without forming a gradient."""
        left, right = self.left[samples], self._right(samples)
        p, q = torch.triu_indices(self.positions, self.positions, device=left.device)
        twice_mixed = torch.where(p == q, 1, 2).to(left.dtype)
        self._add_products(total, left[..., p] * left[..., q] * twice_mixed, right[..., p] * right[..., q])

    @staticmethod
    def _add_products(total: Tensor, left: Tensor, right: Tensor) -> None:
        left, right = (part.movedim(0, -1).flatten(2) for part in (left, right))
        total.baddbmm_(left, right.transpose(1, 2))


@dataclass
class Lookups(SampleGradients):
    """Gradients of the rows that samples look up in a table.

    Args:
        sample: The sample of each look-up, (look-ups,).
        index: The row of each look-up, (look-ups,).
        values: The gradient of each row that was looked up, (look-ups, width).
        count: The number of samples.
        shape: The table's shape, (rows, width).
    """

    sample: Tensor
    index: Tensor
    values: Tensor
    count: int
    shape: torch.Size

    def rows(self, samples: slice) -> Tensor:
        """Return the gradients of some samples."""
        start, stop, _ = samples.indices(self.count)
        here = (self.sample >= start) & (self.sample < stop)
        dense = self.values.new_zeros(stop - start, *self.shape)
        return dense.index_put_((self.sample[here] - start, self.index[here]), self.values[here], True)

    def projected_sum(self, direction: Tensor) -> Tensor:
        """Return the projected sum over samples, computed from the rows that were looked up."""
        values = self.values @ direction.to(self.values.dtype)
        return values.new_zeros(self.shape[0]).index_add_(0, self.index, values)

    def add_squares(self, total: Tensor) -> None:
        """Add the squares, summed over samples, to ``total``."""
        # A sample may look up a row several times: add these gradients before they are squared.
        keys, place = torch.unique(self.sample * self.shape[0] + self.index, return_inverse=True)
        sums = self.values.new_zeros(len(keys), self.shape[1]).index_add_(0, place, self.values)
        total.index_add_(0, keys % self.shape[0], sums.square())


@dataclass
class ChainRule(SampleGradients):
    """Gradients of a parameter, from the gradients of a tensor that is computed from it.

    Args:
        of_computed: The gradients with respect to ``computed``.
        computed: The tensor that is computed from the parameter.
        parameter: The parameter.
    """

    of_computed: SampleGradients
    computed: Tensor
    parameter: Tensor

    def __post_init__(self) -> None:
        self.count, self.shape = self.of_computed.count, self.parameter.shape

    def rows(self, samples: slice) -> Tensor:
        """Return the gradients of some samples."""
        rows = self.of_computed.rows(samples).to(self.computed.dtype)
        (gradients,) = torch.autograd.grad(
            self.computed, self.parameter, rows, retain_graph=True, is_grads_batched=True
        )
        return at_least_single(gradients)

    @property
    def row_elements(self) -> int:
        """The number of elements of the temporaries for both tensors."""
        return self.of_computed.row_elements + 2 * self.shape.numel()


@dataclass
class Sum(SampleGradients):
    """The sum of the gradients of several uses, which may have different forms."""

    parts: Sequence[SampleGradients]

    def __post_init__(self) -> None:
        self.count, self.shape = self.parts[0].count, self.parts[0].shape

    def rows(self, samples: slice) -> Tensor:
        """Return the gradients of some samples."""
        first, *others = (part.rows(samples) for part in self.parts)
        return sum(others, start=first)

    def projected_sum(self, direction: Tensor) -> Tensor:
        """Return the projected sum over samples and parts."""
        return torch.stack([part.projected_sum(direction) for part in self.parts]).sum(0)

    @property
    def row_elements(self) -> int:
        """The number of elements of the temporaries for all parts."""
        return sum(part.row_elements for part in self.parts)


def sum_of_uses(parts: Sequence[SampleGradients]) -> SampleGradients:
    """Return the gradients of a parameter that is used several times, summed before they are squared."""
    if len(parts) == 1:
        return parts[0]
    products = [part for part in parts if isinstance(part, Products)]
    dense = [part for part in parts if isinstance(part, Dense)]
    if len(products) == len(parts):
        return _concatenate(products)
    if len(dense) == len(parts):
        return Dense(torch.stack([part.values for part in dense]).sum(0))
    return Sum(parts)


def _concatenate(parts: Sequence[Products]) -> Products:
    """Return several uses of a linear map as one use with more positions."""

    def right(samples: slice) -> Tensor:
        return torch.cat([part.right(samples) for part in parts], -1)

    return Products(torch.cat([part.left for part in parts], -1), right, parts[0].shape)
