"""The rule for ``nn.Linear``: a linear map of each position's features."""

from __future__ import annotations

from torch import Tensor, nn


def is_batch_first(_layer: nn.Module, inputs: Tensor, size: int) -> bool:
    """Whether ``inputs`` are (batch, ..., features), with ``size`` samples."""
    return inputs.ndim >= 2 and inputs.shape[0] == size


def inputs_by_position(_layer: nn.Module, inputs: Tensor) -> Tensor:
    """The inputs as (batch, groups, features, positions)."""
    return inputs.reshape(inputs.shape[0], 1, -1, inputs.shape[-1]).transpose(2, 3)


def grads_by_position(_layer: nn.Module, grads: Tensor) -> Tensor:
    """The output gradients as (batch, groups, features, positions)."""
    return inputs_by_position(_layer, grads)
