"""Checks of the arguments that estimates of the Fisher information share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.distributions import Distribution

from lightning_blip.fisher.likelihood import _NAMED


def check_labels(labels: str) -> None:
    """Raise a ValueError unless labels are sampled or the data's."""
    if labels not in ("sampled", "empirical"):
        raise ValueError(f'labels={labels!r} is not known: give "sampled" or "empirical"')


def check_smoothing(smoothing: float) -> None:
    """Raise a ValueError unless smoothing is a share."""
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing={smoothing} must be 0 to 1, the share of labels drawn uniformly")


def check_samples(samples: int | None) -> None:
    """Raise a ValueError unless there is at least one sample."""
    if samples is not None and not samples >= 1:
        raise ValueError(f"samples={samples} must be at least 1")


def check_likelihood(likelihood: str | Callable[[Any], Distribution]) -> None:
    """Raise a ValueError for a name that no likelihood has."""
    if not callable(likelihood) and likelihood not in _NAMED:
        raise ValueError(
            f"likelihood={likelihood!r} is not known: give one of {', '.join(map(repr, _NAMED))}, "
            "or a callable that makes a torch.distributions.Distribution of the module's output"
        )
