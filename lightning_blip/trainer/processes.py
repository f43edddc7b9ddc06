"""Several processes: each sees its part of the samples, and all come to the same result."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn


def rank_and_world_size() -> tuple[int, int]:
    """The rank of this process, and how many there are.

    Example:
        >>> rank_and_world_size()
        (0, 1)
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def average(value: Tensor) -> Tensor:
    """The mean over all processes, the same bit for bit on each.

    Args:
        value: This process's; changed in place.

    Returns:
        It.
    """
    _, processes = rank_and_world_size()
    if processes > 1:
        torch.distributed.all_reduce(value)
        value /= processes
    return value


def share_buffers(module: nn.Module) -> None:
    """Gives all processes the first one's buffers, such as running statistics.

    Args:
        module: The network.
    """
    if rank_and_world_size()[1] > 1:
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, src=0)


def gathered(value: Any) -> list[Any]:
    """What each process has, in the order of their ranks.

    Args:
        value: This process's, anything that can be pickled.

    Returns:
        One value a process.

    Example:
        >>> gathered("a")
        ['a']
    """
    _, processes = rank_and_world_size()
    values = [value] * processes
    if processes > 1:
        torch.distributed.all_gather_object(values, value)
    return values
