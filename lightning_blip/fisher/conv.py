"""The rule for convolutions in one to three dimensions: a linear map of each patch."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd


def is_batch_first(layer: nn.Module, inputs: Tensor, size: int) -> bool:
    """Whether ``inputs`` are (batch, channels, ...), with ``size`` samples."""
    return inputs.ndim == len(cast(_ConvNd, layer).kernel_size) + 2 and inputs.shape[0] == size


def inputs_by_position(layer: nn.Module, inputs: Tensor) -> Tensor:
    """The patches that the kernel meets as (batch, groups, features, positions)."""
    conv = cast(_ConvNd, layer)
    padding = conv._reversed_padding_repeated_twice
    if any(padding):
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        inputs = F.pad(inputs, padding, mode=mode)
    dims = len(conv.kernel_size)
    # Each step moves one dimension of positions into place and appends one of offsets within the patch.
    for dim in range(dims):
        extent = conv.dilation[dim] * (conv.kernel_size[dim] - 1) + 1
        inputs = inputs.unfold(dim + 2, extent, conv.stride[dim])[..., :: conv.dilation[dim]]
    positions = inputs.shape[2 : 2 + dims]
    patches = inputs.permute(0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))
    return patches.reshape(patches.shape[0], conv.groups, -1, positions.numel())


def grads_by_position(layer: nn.Module, grads: Tensor) -> Tensor:
    """The output gradients as (batch, groups, features, positions)."""
    return grads.reshape(grads.shape[0], cast(_ConvNd, layer).groups, -1, grads.shape[2:].numel())
