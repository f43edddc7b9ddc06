"""Rules of table look-ups: each sample has gradients only in the rows that it looks up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_blip.fisher.gradients import Lookups, SampleGradients
from lightning_blip.fisher.rules.base import GradientFunction, SamplesFirst, by_function


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    *_: Any,
    **__: Any,
) -> Iterator[tuple[Any, GradientFunction]]:
    if max_norm is None:  # a max_norm would change the table during the forward pass
        yield (
            weight,
            lambda g, samples_first: _lookups(weight, samples_first(input), samples_first(g), padding_idx),
        )


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
) -> Iterator[tuple[Any, GradientFunction]]:
    if max_norm is not None or mode not in ("sum", "mean") or input.ndim != 2:
        return

    def of_weight(g: Tensor, samples_first: SamplesFirst) -> SampleGradients:
        shares = torch.ones_like(input, dtype=g.dtype) if per_sample_weights is None else per_sample_weights
        shares = shares.detach()
        if padding_idx is not None:
            shares = shares.masked_fill(input == padding_idx, 0)
        if mode == "mean":
            shares = shares / shares.sum(1, keepdim=True).clamp_min(1)
        values = samples_first(shares.unsqueeze(-1) * g.unsqueeze(1))
        return _lookups(weight, samples_first(input), values, padding_idx)

    yield weight, of_weight


def _lookups(weight: Tensor, index: Tensor, g: Tensor, padding_idx: int | None) -> Lookups:
    """Return the gradients of the rows ``index``, without the row of the padding."""
    count, width = len(index), weight.shape[1]
    sample = torch.arange(count, device=index.device).repeat_interleave(index[0].numel())
    index, values = index.flatten(), g.reshape(-1, width)
    if padding_idx is not None:
        kept = index != padding_idx % len(weight)
        sample, index, values = sample[kept], index[kept], values[kept]
    return Lookups(sample, index, values, count, weight.shape)


#: Rules of table look-ups.
TABLES = by_function({"embedding": _embedding, "embedding_bag": _embedding_bag}, F)
