"""Rules: how the gradients of single samples follow from an operation's inputs and output gradients.

A rule has its operation's signature. For each tensor that may be a parameter it yields that tensor and a
function of the output's gradients and of ``first``, which puts the samples of a tensor laid out like the
output into a dimension of their own before all others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_blip.fisher.gradients import Dense, Lookups, Products, SampleGradients

First = Callable[[Tensor], Tensor]
Gradients = Callable[[Tensor, First], SampleGradients]
Rule = Callable[..., Iterator[tuple[Any, Gradients]]]


# Linear maps.


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Iterator[tuple[Any, Gradients]]:
    yield weight, lambda g, first: _products(weight, _features(first(g)), _features(first(input)))
    yield bias, _summed(bias)


def _matmul(input: Tensor, other: Tensor) -> Iterator[tuple[Any, Gradients]]:
    if other.ndim == 2:
        yield other, lambda g, first: _products(other, _features(first(input)), _features(first(g)))
    if input.ndim == 2:
        yield input, lambda g, first: _products(input, _features(first(g), -2), _features(first(other), -2))


def _addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Iterator[tuple[Any, Gradients]]:
    yield input, _summed(input, beta)
    for tensor, gradients in _matmul(mat1, mat2):
        yield tensor, _scaled(gradients, alpha)


def _bilinear(
    input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Iterator[tuple[Any, Gradients]]:
    def of_weight(g: Tensor, first: First) -> SampleGradients:
        left, right = _features(first(input1)), _features(first(input2))

        def pairs(samples: slice) -> Tensor:
            return (left[samples].unsqueeze(3) * right[samples].unsqueeze(2)).flatten(2, 3)

        return Products(_features(first(g)), pairs, weight.shape)

    yield weight, of_weight
    yield bias, _summed(bias)


def _convolution(dims: int) -> Rule:
    """A linear map of each patch that the kernel meets."""

    def rule(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Iterator[tuple[Any, Gradients]]:
        def of_weight(g: Tensor, first: First) -> SampleGradients:
            images = first(input)

            def patches(samples: slice) -> Tensor:
                return _patches(
                    images[samples], weight.shape[2:], _each(stride, dims), padding, dilation, groups
                )

            return Products(_channels(first(g), groups), patches, weight.shape)

        yield weight, of_weight
        yield bias, _summed_by_channel()

    return rule


def _transposed_convolution(dims: int) -> Rule:
    """A convolution run backwards: what it puts out is what the kernel meets."""

    def rule(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        dilation: int | Sequence[int] = 1,
    ) -> Iterator[tuple[Any, Gradients]]:
        def of_weight(g: Tensor, first: First) -> SampleGradients:
            grads = first(g)

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

            return Products(_channels(first(input), groups), patches, weight.shape)

        yield weight, of_weight
        yield bias, _summed_by_channel()

    return rule


def _scaled(gradients: Gradients, alpha: float) -> Gradients:
    return lambda g, first: gradients(alpha * g, first)


def _products(weight: Tensor, left: Tensor, right: Tensor) -> Products:
    return Products(left, lambda samples: right[samples], weight.shape)


def _features(tensor: Tensor, dim: int = -1) -> Tensor:
    """(samples, ..., features, ...) as (samples, 1, features, positions)."""
    return tensor.movedim(dim, 1).flatten(2).unsqueeze(1)


def _channels(images: Tensor, groups: int) -> Tensor:
    """(samples, images, channels, *extent) as (samples, groups, channels of a group, positions)."""
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
    """What a kernel meets in images (samples, images, channels, *extent).

    Returns:
        (samples, groups, features of a group, positions), of which there are as many along each dimension as
        fit in, or as many as ``positions`` tells.
    """
    dims = len(kernel)
    dilation = _each(dilation, dims)
    samples, count = images.shape[:2]
    patches: Tensor = F.pad(images.flatten(0, 1), _padding(padding, kernel, dilation))
    # Each step moves one dimension of positions into place and appends one of offsets within the patch.
    for dim in range(dims):
        extent = dilation[dim] * (kernel[dim] - 1) + 1
        patches = patches.unfold(dim + 2, extent, stride[dim])[..., :: dilation[dim]]
        if positions is not None:
            patches = patches.narrow(dim + 2, 0, positions[dim])
    patches = patches.unflatten(0, (samples, count)).movedim(1, 2)
    # Now (samples, channels, images, *positions, *offsets).
    patches = patches.permute(0, 1, *range(3 + dims, 3 + 2 * dims), *range(2, 3 + dims))
    return patches.reshape(samples, groups, -1, count * math.prod(patches.shape[-dims:]))


def _padding(padding: str | int | Sequence[int], kernel: torch.Size, dilation: Sequence[int]) -> list[int]:
    """As ``F.pad`` takes it: the last dimension first, before and after."""
    dims = len(kernel)
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    sizes = [0] * dims if isinstance(padding, str) else _each(padding, dims)
    return [size for size in reversed(sizes) for _ in range(2)]


def _each(value: int | Sequence[int], dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values


# Tables.


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    *_: Any,
    **__: Any,
) -> Iterator[tuple[Any, Gradients]]:
    if max_norm is None:  # which would change the table within the pass
        yield weight, lambda g, first: _lookups(weight, first(input), first(g), padding_idx)


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Iterator[tuple[Any, Gradients]]:
    if max_norm is not None or mode not in ("sum", "mean") or input.ndim != 2:
        return

    def of_weight(g: Tensor, first: First) -> SampleGradients:
        shares = torch.ones_like(input, dtype=g.dtype) if per_sample_weights is None else per_sample_weights
        shares = shares.detach()
        if padding_idx is not None:
            shares = shares.masked_fill(input == padding_idx, 0)
        if mode == "mean":
            shares = shares / shares.sum(1, keepdim=True).clamp_min(1)
        return _lookups(weight, first(input), first(shares.unsqueeze(-1) * g.unsqueeze(1)), padding_idx)

    yield weight, of_weight


def _lookups(weight: Tensor, index: Tensor, g: Tensor, padding_idx: int | None) -> Lookups:
    count, width = len(index), weight.shape[1]
    sample = torch.arange(count, device=index.device).repeat_interleave(index[0].numel())
    index, values = index.flatten(), g.reshape(-1, width)
    if padding_idx is not None:
        kept = index != padding_idx % len(weight)
        sample, index, values = sample[kept], index[kept], values[kept]
    return Lookups(sample, index, values, count, weight.shape)


# Factors and terms of each element.


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Iterator[tuple[Any, Gradients]]:
    yield weight, _summed(weight, lambda: F.layer_norm(input, normalized_shape, eps=eps))
    yield bias, _summed(bias)


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Iterator[tuple[Any, Gradients]]:
    yield weight, _summed(weight, lambda: F.rms_norm(input, normalized_shape, eps=eps))


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Iterator[tuple[Any, Gradients]]:
    yield weight, _summed_by_channel(lambda: F.group_norm(input, num_groups, eps=eps))
    yield bias, _summed_by_channel()


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> Iterator[tuple[Any, Gradients]]:
    if not training:
        yield (
            weight,
            _summed_by_channel(lambda: F.batch_norm(input, running_mean, running_var, eps=eps)),
        )
        yield bias, _summed_by_channel()


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Iterator[tuple[Any, Gradients]]:
    yield (
        weight,
        _summed_by_channel(
            lambda: F.instance_norm(
                input, running_mean, running_var, use_input_stats=use_input_stats, momentum=momentum, eps=eps
            ),
        ),
    )
    yield bias, _summed_by_channel()


def _prelu(input: Tensor, weight: Tensor) -> Iterator[tuple[Any, Gradients]]:
    slopes = partial(torch.clamp_max, input, 0)
    yield weight, _summed_by_channel(slopes) if weight.numel() > 1 else _summed(weight, slopes)


def _add(input: Any, other: Any, *, alpha: float = 1) -> Iterator[tuple[Any, Gradients]]:
    yield input, _summed(input)
    yield other, _summed(other, alpha)


def _sub(input: Any, other: Any, *, alpha: float = 1) -> Iterator[tuple[Any, Gradients]]:
    yield input, _summed(input)
    yield other, _summed(other, -alpha)


def _mul(input: Any, other: Any) -> Iterator[tuple[Any, Gradients]]:
    yield input, _summed(input, other)
    yield other, _summed(other, input)


def _div(input: Any, other: Any) -> Iterator[tuple[Any, Gradients]]:
    yield input, _summed(input, lambda: 1 / other)
    yield other, _summed(other, lambda: -input / other**2)


def _where(condition: Tensor, input: Any, other: Any) -> Iterator[tuple[Any, Gradients]]:
    yield input, _summed(input, condition)
    yield other, _summed(other, lambda: ~condition)


def _spread(input: Tensor, *_: Any, **__: Any) -> Iterator[tuple[Any, Gradients]]:
    yield input, _summed(input)


def _summed(parameter: Tensor | Any, factor: Any = 1) -> Gradients:
    """The gradients times ``factor`` (or what it returns), summed to the shape of ``parameter``."""

    def gradients(g: Tensor, first: First) -> SampleGradients:
        values = first(_times(g, factor))
        shape = [1] * (values.ndim - 1 - parameter.ndim) + list(parameter.shape)
        return Dense(values.sum_to_size(len(values), *shape).reshape(len(values), *parameter.shape))

    return gradients


def _summed_by_channel(factor: Any = 1) -> Gradients:
    """The gradients times ``factor`` (or what it returns), summed over all but samples and channels."""

    def gradients(g: Tensor, first: First) -> SampleGradients:
        return Dense(first(_times(g, factor)).transpose(1, 2).flatten(2).sum(2))

    return gradients


def _times(g: Tensor, factor: Any) -> Tensor:
    factor = factor() if callable(factor) and not isinstance(factor, Tensor) else factor
    product: Tensor = g if isinstance(factor, int) and factor == 1 else g * factor
    return product


def _table(rules: dict[str, Rule], *owners: Any) -> dict[Any, Rule]:
    return {
        getattr(owner, name): rule for name, rule in rules.items() for owner in owners if hasattr(owner, name)
    }


#: The operations in which a parameter meets samples by spreading over them.
SPREADS = _table(
    dict.fromkeys(("expand", "expand_as", "broadcast_to", "repeat"), _spread), torch, torch.Tensor
)

RULES: dict[Any, Rule] = {
    **SPREADS,
    **_table(
        {
            **dict.fromkeys(("add", "add_", "__add__", "__radd__", "__iadd__"), _add),
            **dict.fromkeys(("sub", "sub_", "subtract", "__sub__", "__isub__"), _sub),
            **dict.fromkeys(("mul", "multiply", "__mul__", "__rmul__"), _mul),
            **dict.fromkeys(("div", "divide", "true_divide", "__div__", "__truediv__"), _div),
            **dict.fromkeys(("matmul", "mm", "__matmul__"), _matmul),
            "addmm": _addmm,
        },
        torch,
        torch.Tensor,
    ),
    torch.where: _where,
    **_table(
        {
            "linear": _linear,
            "bilinear": _bilinear,
            **{f"conv{dims}d": _convolution(dims) for dims in (1, 2, 3)},
            **{f"conv_transpose{dims}d": _transposed_convolution(dims) for dims in (1, 2, 3)},
            "prelu": _prelu,
            "embedding": _embedding,
            "embedding_bag": _embedding_bag,
            "layer_norm": _layer_norm,
            "rms_norm": _rms_norm,
            "group_norm": _group_norm,
            "batch_norm": _batch_norm,
            "instance_norm": _instance_norm,
        },
        F,
    ),
}
