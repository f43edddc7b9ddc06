"""Random state that is saved and restored, so that a resumed fit draws the same numbers."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Return the state of the global generators of torch (on all devices in use), NumPy and Python.

    Returns:
        Only tensors and plain values, so that a checkpoint that holds them loads with ``weights_only=True``.
    """
    of_numpy: dict[str, Any] = dict(np.random.get_state(legacy=False))  # noqa: NPY002
    twister = of_numpy["state"]
    version, words, next_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": {**of_numpy, "state": {**twister, "key": torch.from_numpy(twister["key"].astype(np.int64))}},
        "python": [version, list(words), next_gauss],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore the state of the global generators.

    Args:
        state: The result of :func:`random_state`.

    Example:
        >>> state, drawn = random_state(), torch.rand(())
        >>> set_random_state(state)
        >>> torch.rand(()) == drawn
        tensor(True)
    """
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    twister = state["numpy"]["state"]
    key = twister["key"].numpy().astype(np.uint32)
    np.random.set_state({**state["numpy"], "state": {**twister, "key": key}})  # noqa: NPY002
    version, words, next_gauss = state["python"]
    random.setstate((version, tuple(words), next_gauss))


def generator_of(key: tuple[int, ...]) -> torch.Generator:
    """Return a generator that is seeded by a key, such as (seed, task, epoch).

    Args:
        key: The key. Equal keys give equal numbers, no matter what was drawn before.

    Returns:
        The generator, on the CPU.

    Example:
        >>> torch.equal(*(torch.randperm(9, generator=generator_of((0, 1))) for _ in range(2)))
        True
    """
    return torch.Generator().manual_seed(random.Random(str(key)).getrandbits(63))
