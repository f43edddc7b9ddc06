"""How much memory some work allocates at its peak."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that tensors made by ``work`` take at a time, counted from what was there before.

    On the CPU it is counted from the allocations themselves, so that it is the same in every run.

    Args:
        work: What to run; tensors that it leaves behind count too.

    Returns:
        Bytes.

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
