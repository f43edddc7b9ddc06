"""Checks on the entries of a saved state, before any of them is used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def check_tensor(
    state: Mapping[str, Any], name: str, dtypes: Sequence[torch.dtype], shape: Sequence[int]
) -> None:
    """Raise an error unless an entry is a finite tensor of the right type and shape.

    Args:
        state: The saved state.
        name: The name of the entry.
        dtypes: The allowed types.
        shape: The right shape.

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
    """Raise an error unless an entry is a number within a range.

    Args:
        state: The saved state.
        name: The name of the entry.
        low: The smallest allowed value.
        high: The largest allowed value.

    Raises:
        ValueError: If it is not.

    Example:
        >>> check_number({"tasks": 2}, "tasks", 0)
    """
    value = state[name]
    if not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name}={value!r} should be a number from {low} to {high}")


@contextmanager
def naming(parameter: str) -> Iterator[None]:
    """Add the name of a parameter to every ValueError raised inside.

    Example:
        >>> with naming("body.weight"):
        ...     raise ValueError("it is damaged")
        Traceback (most recent call last):
        ...
        ValueError: Parameter 'body.weight': it is damaged
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"Parameter {parameter!r}: {error}") from error
