"""Rules of linear maps and convolutions: a sample's gradient is a product of two matrices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_blip.fisher.gradients import Products, SampleGradients
from lightning_blip.fisher.rules.base import (
    GradientFunction,
    GradientRule,
    SamplesFirst,
    by_function,
    summed,
    summed_by_channel,
)


def _linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Iterator[tuple[Any, GradientFunction]]:
    yield weight, lambda g, samples_first: _products(weight, samples_first(g), samples_first(input))
    yield bias, summed(bias)


def _matmul(input: Tensor, other: Tensor) -> Iterator[tuple[Any, GradientFunction]]:
    if other.ndim == 2:
        yield other, lambda g, samples_first: _products(other, samples_first(input), samples_first(g))
    if input.ndim == 2:
        yield input, lambda g, samples_first: _products(input, samples_first(g), samples_first(other), -2)


def _addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Iterator[tuple[Any, GradientFunction]]:
    yield input, summed(input, beta)
    for tensor, gradients in _matmul(mat1, mat2):
        yield tensor, _scaled(gradients, alpha)


def _bilinear(
    input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Iterator[tuple[Any, GradientFunction]]:
    def of_weight(g: Tensor, samples_first: SamplesFirst) -> SampleGradients:
        left, right = _features(samples_first(input1)), _features(samples_first(input2))

        def pairs(samples: slice) -> Tensor:
            return (left[samples].unsqueeze(3) * right[samples].unsqueeze(2)).flatten(2, 3)

        return Products(_features(samples_first(g)), pairs, weight.shape)

    yield weight, of_weight
    yield bias, summed(bias)


def _convolution(dims: int) -> GradientRule:
    """Return the rule of a convolution: a linear map of each patch of the input."""

    def rule(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Iterator[tuple[Any, GradientFunction]]:
        def of_weight(g: Tensor, samples_first: SamplesFirst) -> SampleGradients:
            images = samples_first(input)

            def patches(samples: slice) -> Tensor:
                return _patches(
                    images[samples], weight.shape[2:], _each(stride, dims), padding, dilation, groups
                )

            return Products(_channels(samples_first(g), groups), patches, weight.shape)

        yield weight, of_weight
        yield bias, summed_by_channel()

    return rule


def _transposed_convolution(dims: int) -> GradientRule:
    """Return the rule of a transposed convolution: the patches are those of the output."""

    def rule(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        dilation: int | Sequence[int] = 1,
    ) -> Iterator[tuple[Any, GradientFunction]]:
        def of_weight(g: Tensor, samples_first: SamplesFirst) -> SampleGradients:
            grads = samples_first(g)

            def patches(samples: slice) -> Tensor:
                return _patches(
                    grads[samples],
                    weight.shape[2:],
                    _each(stride, dims),
                    padding,
                    dilation,
                    groups,
                    input.shape[2:],
                )

            return Products(_channels(samples_first(input), groups), patches, weight.shape)

        yield weight, of_weight
        yield bias, summed_by_channel()

    return rule


def _scaled(gradients: GradientFunction, alpha: float) -> GradientFunction:
    return lambda g, samples_first: gradients(alpha * g, samples_first)


def _products(weight: Tensor, left: Tensor, right: Tensor, dim: int = -1) -> Products:
    """Return the products of ``left`` and ``right``, whose features are in dimension ``dim``."""
    features = _features(right, dim)
    return Products(_features(left, dim), lambda samples: features[samples], weight.shape)


def _features(tensor: Tensor, dim: int = -1) -> Tensor:
    """Reshape (samples, ..., features, ...) to (samples, 1, features, positions)."""
    return tensor.movedim(dim, 1).flatten(2).unsqueeze(1)


def _channels(images: Tensor, groups: int) -> Tensor:
    """Reshape (samples, images, channels, *size) to (samples, groups, channels per group, positions)."""
    divided: Tensor = images.transpose(1, 2).flatten(2).unflatten(1, (groups, -1))
    return divided


def _patches(
    images: Tensor,
    kernel: torch.Size,
    stride: Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    positions: torch.Size | None = None,
) -> Tensor:
    """Return the patches of images that a kernel is applied to.

    Args:
        images: (samples, images, channels, *size).
        kernel: The kernel's size.
        stride: As of the convolution.
        padding: As of the convolution.
        dilation: As of the convolution.
        groups: As of the convolution.
        positions: The number of patches along each dimension; default, as many as fit.

    Returns:
        (samples, groups, features per group, positions).
    """
    dims = len(kernel)
    dilation = _each(dilation, dims)
    samples, count = images.shape[:2]
    patches: Tensor = F.pad(images.flatten(0, 1), _padding(padding, kernel, dilation))
    # Each step turns one dimension into positions and appends one dimension of offsets within the patch.
    for dim in range(dims):
        extent = dilation[dim] * (kernel[dim] - 1) + 1
        patches = patches.unfold(dim + 2, extent, stride[dim])[..., :: dilation[dim]]
        if positions is not None:
            patches = patches.narrow(dim + 2, 0, positions[dim])
    patches = patches.unflatten(0, (samples, count)).movedim(1, 2)
    # The shape is now (samples, channels, images, *positions, *offsets).
    patches = patches.permute(0, 1, *range(3 + dims, 3 + 2 * dims), *range(2, 3 + dims))
    return patches.reshape(samples, groups, -1, count * math.prod(patches.shape[-dims:]))


def _padding(padding: str | int | Sequence[int], kernel: torch.Size, dilation: Sequence[int]) -> list[int]:
    """Return the padding for ``F.pad``: before and after each dimension, the last dimension first."""
    dims = len(kernel)
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    sizes = [0] * dims if isinstance(padding, str) else _each(padding, dims)
    return [size for size in reversed(sizes) for _ in range(2)]


def _each(value: int | Sequence[int], dims: int) -> list[int]:
    """Return one value per dimension."""
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values


#: Rules of linear maps and convolutions.
LINEAR_MAPS = {
    **by_function(
        {**dict.fromkeys(("matmul", "mm", "__matmul__"), _matmul), "addmm": _addmm}, torch, torch.Tensor
    ),
    **by_function(
        {
            "linear": _linear,
            "bilinear": _bilinear,
            **{f"conv{dims}d": _convolution(dims) for dims in (1, 2, 3)},
            **{f"conv_transpose{dims}d": _transposed_convolution(dims) for dims in (1, 2, 3)},
        },
        F,
    ),
}
