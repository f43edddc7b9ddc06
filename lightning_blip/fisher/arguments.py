"""Checks of arguments that all estimates of the Fisher information share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.distributions import Distribution

from lightning_blip.fisher.likelihood import LIKELIHOODS


def check_labels(labels: str) -> None:
    """Raise a ValueError unless ``labels`` is "sampled" or "empirical"."""
    if labels not in ("sampled", "empirical"):
        raise ValueError(f'labels={labels!r} is not known: give "sampled" or "empirical"')


def check_smoothing(smoothing: float) -> None:
    """Raise a ValueError unless ``smoothing`` is between 0 and 1."""
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing={smoothing} must be 0 to 1, the share of labels drawn uniformly")


def check_samples(samples: int | None) -> None:
    """Raise a ValueError unless ``samples`` is at least 1, or None for all samples."""
    if samples is not None and not samples >= 1:
        raise ValueError(f"samples={samples} must be at least 1")


def check_likelihood(likelihood: str | Callable[[Any], Distribution]) -> None:
    """Raise a ValueError unless ``likelihood`` is a known name or a callable.

    Example:
        >>> check_likelihood("categoricl")
        Traceback (most recent call last):
        ...
        ValueError: likelihood='categoricl' is not known: give one of 'categorical', ...
    """
    known = isinstance(likelihood, str) and likelihood in LIKELIHOODS
    if not known and not callable(likelihood):
        raise ValueError(
            f"likelihood={likelihood!r} is not known: give one of {', '.join(map(repr, LIKELIHOODS))}, "
            "or a callable that makes a torch.distributions.Distribution of the module's output"
        )
