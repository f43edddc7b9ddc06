"""Random numbers that a resumed fit draws as the unbroken one would have."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """The state of the global generators of torch (on all devices in use), numpy and Python.

    Returns:
        Tensors and plain values alone: a checkpoint that holds it loads with ``weights_only=True``.
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
    """Goes back to a state.

    Args:
        state: Of :func:`random_state`.

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
    """A generator of its own for what has a key, such as (seed, task, epoch).

    Args:
        key: Of what is drawn: whatever else has been drawn before makes no difference.

    Returns:
        The generator, on the CPU.

    Example:
        >>> torch.equal(*(torch.randperm(9, generator=generator_of((0, 1))) for _ in range(2)))
        True
    """
    return torch.Generator().manual_seed(random.Random(str(key)).getrandbits(63))
