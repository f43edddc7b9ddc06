"""The machine that measured the figures, in words."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def machine(device: str = "cpu") -> str:
    """Return the name of the processor.

    Args:
        device: ``"cpu"`` or ``"cuda"``.

    Returns:
        Its model; for a CPU also the number of threads of torch.
    """
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.processor() or platform.machine()
    return f"{model}, {torch.get_num_threads()} threads"
