"""Sums over samples of squared products: the work that all rules share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

# Temporaries of this size stay in a processor's last cache, and below the size from which the allocator asks
# the system for fresh pages each time.
CPU_CHUNK_BYTES = 24 * 2**20
GPU_CHUNK_BYTES = 256 * 2**20


def add_squared_products(total: Tensor, inputs_of: Callable[[slice], Tensor], grads: Tensor) -> None:
    """Adds Σ_n (G_n A_nᵀ)² to ``total``.

    Args:
        total: (groups, out, in).
        inputs_of: Gives A for a slice of the samples: (batch, groups, in, positions).
        grads: G, (batch, groups, out, positions).
    """
    if grads.shape[-1] == 1:
        # The square of a product of two numbers is the product of their squares: no per-sample matrix.
        squared_inputs = inputs_of(slice(None)).to(total.dtype).squeeze(-1).square()
        squared_grads = grads.squeeze(-1).square()
        total.baddbmm_(squared_grads.permute(1, 2, 0), squared_inputs.transpose(0, 1))
        return
    for samples in _chunks(total, grads):
        inputs = inputs_of(samples).to(total.dtype)
        for product in grads[samples] @ inputs.transpose(-1, -2):
            total.addcmul_(product, product)


def _chunks(total: Tensor, grads: Tensor) -> Iterator[slice]:
    """Slices of the samples whose products and inputs are as large as a chunk may be."""
    _, groups, _, positions = grads.shape
    per_sample = (total.numel() + groups * total.shape[-1] * positions) * total.element_size()
    limit = GPU_CHUNK_BYTES if total.is_cuda else CPU_CHUNK_BYTES
    step = max(1, limit // per_sample)
    return (slice(start, start + step) for start in range(0, grads.shape[0], step))
