"""Rules of operations on single elements: norms, PReLU, arithmetic and broadcasting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_blip.fisher.rules.base import GradientFunction, by_function, summed, summed_by_channel


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Iterator[tuple[Any, GradientFunction]]:
    yield weight, summed(weight, lambda: F.layer_norm(input, normalized_shape, eps=eps))
    yield bias, summed(bias)


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Iterator[tuple[Any, GradientFunction]]:
    yield weight, summed(weight, lambda: F.rms_norm(input, normalized_shape, eps=eps))


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Iterator[tuple[Any, GradientFunction]]:
    yield weight, summed_by_channel(lambda: F.group_norm(input, num_groups, eps=eps))
    yield bias, summed_by_channel()


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
) -> Iterator[tuple[Any, GradientFunction]]:
    if not training:
        yield (
            weight,
            summed_by_channel(lambda: F.batch_norm(input, running_mean, running_var, eps=eps)),
        )
        yield bias, summed_by_channel()


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Iterator[tuple[Any, GradientFunction]]:
    yield (
        weight,
        summed_by_channel(
            lambda: F.instance_norm(
                input, running_mean, running_var, use_input_stats=use_input_stats, momentum=momentum, eps=eps
            ),
        ),
    )
    yield bias, summed_by_channel()


def _prelu(input: Tensor, weight: Tensor) -> Iterator[tuple[Any, GradientFunction]]:
    slopes = partial(torch.clamp_max, input, 0)
    yield weight, summed_by_channel(slopes) if weight.numel() > 1 else summed(weight, slopes)


def _add(input: Any, other: Any, *, alpha: float = 1) -> Iterator[tuple[Any, GradientFunction]]:
    yield input, summed(input)
    yield other, summed(other, alpha)


def _sub(input: Any, other: Any, *, alpha: float = 1) -> Iterator[tuple[Any, GradientFunction]]:
    yield input, summed(input)
    yield other, summed(other, -alpha)


def _mul(input: Any, other: Any) -> Iterator[tuple[Any, GradientFunction]]:
    yield input, summed(input, other)
    yield other, summed(other, input)


def _div(input: Any, other: Any) -> Iterator[tuple[Any, GradientFunction]]:
    yield input, summed(input, lambda: 1 / other)
    yield other, summed(other, lambda: -input / other**2)


def _where(condition: Tensor, input: Any, other: Any) -> Iterator[tuple[Any, GradientFunction]]:
    yield input, summed(input, condition)
    yield other, summed(other, lambda: ~condition)


def _expand(input: Tensor, *_: Any, **__: Any) -> Iterator[tuple[Any, GradientFunction]]:
    yield input, summed(input)


#: Operations that expand a parameter, so that each sample has its own copy.
EXPANSIONS = by_function(
    dict.fromkeys(("expand", "expand_as", "broadcast_to", "repeat"), _expand), torch, torch.Tensor
)

#: Rules of norms, PReLU and arithmetic.
ELEMENTWISE = {
    **by_function(
        {
            **dict.fromkeys(("add", "add_", "__add__", "__radd__", "__iadd__"), _add),
            **dict.fromkeys(("sub", "sub_", "subtract", "__sub__", "__isub__"), _sub),
            **dict.fromkeys(("mul", "multiply", "__mul__", "__rmul__"), _mul),
            **dict.fromkeys(("div", "divide", "true_divide", "__div__", "__truediv__"), _div),
        },
        torch,
        torch.Tensor,
    ),
    torch.where: _where,
    **by_function(
        {
            "prelu": _prelu,
            "layer_norm": _layer_norm,
            "rms_norm": _rms_norm,
            "group_norm": _group_norm,
            "batch_norm": _batch_norm,
            "instance_norm": _instance_norm,
        },
        F,
    ),
}
