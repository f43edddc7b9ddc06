"""The gradients of single samples, each in the form in which its squares cost least."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# What temporaries may take beside a batch's own activations.
BUDGET_BYTES = 256 * 2**20
# Temporaries of this size stay in a processor's last cache, and below the size from which the allocator asks
# the system for fresh pages each time.
CPU_CHUNK_BYTES = 24 * 2**20
# Squaring an element and adding it takes as long as this many multiply-adds of a matrix product (measured on
# an AVX2 processor).
MULTIPLY_ADDS_PER_SQUARE = 20


def at_least_single(tensor: Tensor) -> Tensor:
    """``tensor`` in its own floating type, or in float32 where that is narrower."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def along(tensor: Tensor, direction: Tensor) -> Tensor:
    """``tensor`` projected on ``direction`` in all but its first dimension, if it has several."""
    return tensor.flatten(1) @ direction.to(tensor.dtype) if tensor.ndim > 1 else tensor


def add_squared_rows(total: Tensor, rows: Tensor) -> None:
    """Adds the squares of ``rows``, summed over the first dimension, to ``total``."""
    if total.is_cuda:  # where it is kernels that cost, few of them; else few passes over memory
        total += rows.square().sum(0)
    else:
        for row in rows:
            total.addcmul_(row, row)


class Observer(Protocol):
    """Looks at the gradients of an estimate as they come, batch by batch."""

    def see(self, name: str, gradients: SampleGradients) -> None:
        """Looks at what a parameter's gradients are for the samples of a batch, if a rule serves it."""

    def end_batch(self, size: int) -> None:
        """Knows now that all parameters of a batch of so many samples have been seen."""


class SampleGradients(ABC):
    """One gradient for each of ``count`` samples, with respect to a tensor of shape ``shape``."""

    count: int
    shape: torch.Size

    @abstractmethod
    def rows(self, samples: slice) -> Tensor:
        """The gradients of some samples: (samples, *shape)."""

    def total_along(self, direction: Tensor) -> Tensor:
        """The sum over samples, in all but its first dimension projected on ``direction``."""
        return along(self.rows(slice(None)).sum(0), direction)

    @property
    def row_elements(self) -> int:
        """How many elements the temporaries of one row have."""
        return 2 * self.shape.numel()

    def add_squares(self, total: Tensor) -> None:
        """Adds the squares, summed over samples, to ``total``."""
        for samples in self.chunks(total):
            add_squared_rows(total, self.rows(samples))

    def overlaps(self, block: int) -> Tensor:
        """The inner products of the gradients of neighbours.

        Args:
            block: Samples are neighbours in blocks of so many; what is left over has no neighbours.

        Returns:
            (blocks, block, block).
        """
        starts = range(0, self.count // block * block, block)
        rows = (self.rows(slice(start, start + block)).reshape(block, -1) for start in starts)
        return torch.stack([part @ part.T for part in rows])

    def chunks(self, total: Tensor, elements: int | None = None) -> Iterator[slice]:
        """Slices of the samples whose rows, or so many elements each, are as large as temporaries may be."""
        limit = BUDGET_BYTES // 2 if total.is_cuda else CPU_CHUNK_BYTES
        step = max(1, limit // max(1, (elements or self.row_elements) * total.element_size()))
        return (slice(start, start + step) for start in range(0, self.count, step))


@dataclass
class Dense(SampleGradients):
    """The gradients themselves, of shape (samples, *shape): for small parameters."""

    values: Tensor

    def __post_init__(self) -> None:
        self.count, self.shape = self.values.shape[0], self.values.shape[1:]

    def rows(self, samples: slice) -> Tensor:
        """The gradients of some samples."""
        return self.values[samples]

    def add_squares(self, total: Tensor) -> None:
        """Adds the squares, summed over samples, to ``total``."""
        total += self.values.square().sum(0)


@dataclass
class Products(SampleGradients):
    """Gradients of linear maps: for each sample the product of two matrices, summed over its positions.

    Args:
        left: (samples, groups, m, positions).
        right: For a slice of the samples, (samples, groups, n, positions).
        shape: The parameter's, of groups·m·n elements in this order.
    """

    left: Tensor
    right: Callable[[slice], Tensor]
    shape: torch.Size

    def __post_init__(self) -> None:
        self.left = at_least_single(self.left)
        self.count, self.groups, self.m, self.positions = self.left.shape
        self.n = self.shape.numel() // max(1, self.groups * self.m)

    def rows(self, samples: slice) -> Tensor:
        """The gradients of some samples."""
        return self._products(samples).reshape(-1, *self.shape)

    def total_along(self, direction: Tensor) -> Tensor:
        """The sum over samples, without forming a product."""
        right = direction.to(self.left.dtype) @ self._right(slice(None))
        return (self.left @ right.unsqueeze(-1)).sum(0).flatten()

    @property
    def row_elements(self) -> int:
        """A product, and the positions that it is made of."""
        return self.shape.numel() + self.groups * self.n * self.positions

    def add_squares(self, total: Tensor) -> None:
        """Adds the squares, summed over samples, to ``total``, in the cheapest of three exact ways."""
        matrices = total.view(self.groups, self.m, self.n)
        pairs = self.positions * (self.positions - 1) // 2
        if self.positions == 1:
            # The square of a product of two numbers is the product of their squares.
            self._add_products(matrices, self.left.square(), self._right(slice(None)).square())
        elif pairs <= MULTIPLY_ADDS_PER_SQUARE:
            for samples in self.chunks(total):
                self._add_gram(matrices, samples)
        else:
            for samples in self.chunks(total):
                add_squared_rows(matrices, self._products(samples))

    def overlaps(self, block: int) -> Tensor:
        """The inner products of neighbours' gradients; at a single position no gradient is formed."""
        if self.positions > 1:
            return super().overlaps(block)
        kept = slice(self.count // block * block)
        parts = (self.left[kept], self._right(kept))
        left, right = (part.reshape(-1, block, self.groups, part.shape[2]).transpose(1, 2) for part in parts)
        return ((left @ left.mT) * (right @ right.mT)).sum(1)

    def add_factors(self, of_input: Tensor, of_output: Tensor) -> None:
        """Adds the Kronecker factors, summed over samples and positions, of a map of one group.

        Args:
            of_input: Σ r·rᵀ, (n, n), or (n + 1, n + 1) with an input more that is always 1: the bias's.
            of_output: Σ l·lᵀ, (m, m).
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
        """(Σ_p l_p·r_p)² = Σ_pq (l_p·l_q)·(r_p·r_q): no product of a single sample is ever formed."""
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
    """Gradients of rows looked up in a table: never a whole table for a sample.

    Args:
        sample: Which sample made each look-up, (look-ups,).
        index: Which row it took, (look-ups,).
        values: The gradient of what it got, (look-ups, width).
        count: How many samples there are.
        shape: The table's, (rows, width).
    """

    sample: Tensor
    index: Tensor
    values: Tensor
    count: int
    shape: torch.Size

    def rows(self, samples: slice) -> Tensor:
        """The gradients of some samples."""
        start, stop, _ = samples.indices(self.count)
        here = (self.sample >= start) & (self.sample < stop)
        dense = self.values.new_zeros(stop - start, *self.shape)
        return dense.index_put_((self.sample[here] - start, self.index[here]), self.values[here], True)

    def total_along(self, direction: Tensor) -> Tensor:
        """The sum over samples, of the rows looked up alone."""
        values = self.values @ direction.to(self.values.dtype)
        return values.new_zeros(self.shape[0]).index_add_(0, self.index, values)

    def add_squares(self, total: Tensor) -> None:
        """Adds the squares, summed over samples, to ``total``."""
        # A sample may look a row up several times: its gradients add up before they are squared.
        keys, place = torch.unique(self.sample * self.shape[0] + self.index, return_inverse=True)
        sums = self.values.new_zeros(len(keys), self.shape[1]).index_add_(0, place, self.values)
        total.index_add_(0, keys % self.shape[0], sums.square())


@dataclass
class Pulled(SampleGradients):
    """Gradients with respect to ``parameter``, from those with respect to a tensor computed from it."""

    of_computed: SampleGradients
    computed: Tensor
    parameter: Tensor

    def __post_init__(self) -> None:
        self.count, self.shape = self.of_computed.count, self.parameter.shape

    def rows(self, samples: slice) -> Tensor:
        """The gradients of some samples."""
        rows = self.of_computed.rows(samples).to(self.computed.dtype)
        (pulled,) = torch.autograd.grad(
            self.computed, self.parameter, rows, retain_graph=True, is_grads_batched=True
        )
        return at_least_single(pulled)

    @property
    def row_elements(self) -> int:
        """Those of both tensors."""
        return self.of_computed.row_elements + 2 * self.shape.numel()


@dataclass
class Sum(SampleGradients):
    """The sum of several uses' gradients, of whatever forms."""

    parts: Sequence[SampleGradients]

    def __post_init__(self) -> None:
        self.count, self.shape = self.parts[0].count, self.parts[0].shape

    def rows(self, samples: slice) -> Tensor:
        """The gradients of some samples."""
        first, *others = (part.rows(samples) for part in self.parts)
        return sum(others, start=first)

    def total_along(self, direction: Tensor) -> Tensor:
        """The sum over samples and parts."""
        return torch.stack([part.total_along(direction) for part in self.parts]).sum(0)

    @property
    def row_elements(self) -> int:
        """Those of all parts."""
        return sum(part.row_elements for part in self.parts)


def add(parts: Sequence[SampleGradients]) -> SampleGradients:
    """The gradients of a parameter that is used several times: summed, before anything is squared."""
    if len(parts) == 1:
        return parts[0]
    products = [part for part in parts if isinstance(part, Products)]
    dense = [part for part in parts if isinstance(part, Dense)]
    if len(products) == len(parts):
        return _joined(products)
    if len(dense) == len(parts):
        return Dense(torch.stack([part.values for part in dense]).sum(0))
    return Sum(parts)


def _joined(parts: Sequence[Products]) -> Products:
    """Several uses of a linear map are more positions of the same samples."""

    def right(samples: slice) -> Tensor:
        return torch.cat([part.right(samples) for part in parts], -1)

    return Products(torch.cat([part.left for part in parts], -1), right, parts[0].shape)
