"""Communication between processes: each sees a part of the samples, and all get the same result."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn


def rank_and_world_size() -> tuple[int, int]:
    """Return the rank of this process and the number of processes.

    Example:
        >>> rank_and_world_size()
        (0, 1)
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def average(value: Tensor) -> Tensor:
    """Average a tensor over all processes, bit for bit the same in each.

    Args:
        value: This process's tensor, changed in place.

    Returns:
        The same tensor.
    """
    _, world_size = rank_and_world_size()
    if world_size > 1:
        torch.distributed.all_reduce(value)
        value /= world_size
    return value


def share_buffers(module: nn.Module) -> None:
    """Copy the buffers of rank 0, such as running statistics, to all processes.

    Args:
        module: The network.
    """
    if rank_and_world_size()[1] > 1:
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, src=0)


def gathered(value: Any) -> list[Any]:
    """Return the values of all processes, in the order of their ranks.

    Args:
        value: This process's value; it must be picklable.

    Returns:
        One value per process.

    Example:
        >>> gathered("a")
        ['a']
    """
    _, world_size = rank_and_world_size()
    values = [value] * world_size
    if world_size > 1:
        torch.distributed.all_gather_object(values, value)
    return values
