"""Checks on what a checkpoint holds, before anything is made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def check_tensor(
    state: Mapping[str, Any], name: str, dtypes: Sequence[torch.dtype], shape: Sequence[int]
) -> None:
    """Refuses what is no finite tensor of a type and shape.

    Args:
        state: What was saved.
        name: Of the entry.
        dtypes: Those that are right.
        shape: Its shape.

    Raises:
        ValueError: If it is not.

    Example:
        >>> check_tensor({"packed": torch.zeros(2, dtype=torch.int32)}, "packed", [torch.int32], (2,))
    """
    value = state[name]
    if not isinstance(value, Tensor) or value.dtype not in dtypes or value.shape != torch.Size(shape):
        found = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{name} should be {dtypes[0]} of shape {tuple(shape)}, and is {found}")
    if not value.isfinite().all():
        raise ValueError(f"{name} has values that are not finite")


def check_number(state: Mapping[str, Any], name: str, low: float, high: float = float("inf")) -> None:
    """Refuses what is no number in a range.

    Args:
        state: What was saved.
        name: Of the entry.
        low: The least that is right.
        high: The most.

    Raises:
        ValueError: If it is not.

    Example:
        >>> check_number({"tasks": 2}, "tasks", 0)
    """
    value = state[name]
    if not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name}={value!r} should be a number from {low} to {high}")
