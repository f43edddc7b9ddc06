"""The peak memory of a function, and the memory that an object holds."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], object]) -> int:
    """Return the peak memory of the tensors that a function allocates.

    On the CPU it is summed from the allocations, so that it is the same in every run.

    Args:
        work: The function; tensors that outlive it count too.

    Returns:
        Bytes, above what was allocated before.

    Example:
        >>> 8_000 <= peak_bytes(lambda: torch.zeros(1_000) + 1) < 9_000
        True
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    results = profiler.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    held = peak = 0
    for event in events:
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def held_bytes(holder: object, beside: nn.Module) -> int:
    """Return the memory of the tensors that an object holds, without those of a network.

    Args:
        holder: An object of this project or a container; its attributes or items are searched.
        beside: The network.

    Returns:
        Bytes.

    Example:
        >>> network = nn.Linear(4, 2)
        >>> held_bytes({"copy": network.weight.detach().clone(), "own": network.weight}, network)
        32
    """
    seen = {id(theta) for theta in (*beside.parameters(), *beside.buffers())}
    total, left = 0, [holder]
    while left:
        thing = left.pop()
        if id(thing) in seen or thing is beside:
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            total += thing.nbytes
        elif isinstance(thing, Mapping):
            left += thing.values()
        elif isinstance(thing, (list, tuple, set)):
            left += thing
        elif isinstance(thing, nn.Module):
            left += [*thing.parameters(), *thing.buffers()]
        elif type(thing).__module__.partition(".")[0] in ("benchmarks", "lightning_blip"):
            left += vars(thing).values()
    return total
