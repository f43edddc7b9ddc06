"""Which parameters BLIP tracks: trainable, outside of task heads, and as the user's patterns say."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from lightning_blip.tasks.heads import shared_parameters


def tracked_parameters(
    module: nn.Module,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Return the parameters whose bits are frozen, by name.

    Args:
        module: The network.
        include: Name patterns of the parameters to track; all by default.
        exclude: Name patterns of parameters to leave alone.

    Returns:
        The trainable parameters outside of :class:`lightning_blip.TaskHeads` that match.

    Raises:
        ValueError: If a pattern matches no parameter, or a parameter is in half precision.

    Example:
        >>> list(tracked_parameters(nn.Linear(4, 2), exclude="bias"))
        ['weight']
    """
    trainable = shared_parameters(module)
    for argument, patterns in (("include", include), ("exclude", exclude)):
        for pattern in _as_list(patterns):
            if not any(fnmatchcase(name, pattern) for name in trainable):
                raise ValueError(f"{argument}={pattern!r} matches none of the parameters {list(trainable)}")
    tracked: dict[str, Tensor] = {
        name: theta
        for name, theta in trainable.items()
        if (include is None or _matches(name, include)) and not _matches(name, exclude)
    }
    for name, theta in tracked.items():
        if theta.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"Parameter {name!r} is {theta.dtype}, which has too few bits to freeze: keep it in float32 "
                '(precision="bf16-mixed" does), or leave it out with exclude'
            )
    return tracked


def _as_list(patterns: str | Sequence[str] | None) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns or ())


def _matches(name: str, patterns: str | Sequence[str] | None) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _as_list(patterns))
