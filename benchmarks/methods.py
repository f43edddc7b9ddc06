"""The methods that are compared, and the one setting of each that is searched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytorch_lightning as pl

from benchmarks.baselines import EWC, GPM, MAS, SI, FineTuning, FrozenBody, LwF
from lightning_blip import BLIP


@dataclass(frozen=True)
class Method:
    """A method as it enters the comparison.

    Attributes:
        title: How it is called in tables and pictures.
        make: Its callback, from its settings.
        setting: The main one, which is searched; None where nothing is.
        values: Those that the search tries.
    """

    title: str
    make: Callable[..., pl.Callback]
    setting: str | None = None
    values: tuple[float, ...] = ()


#: By the name that the command line knows.
METHODS: dict[str, Method] = {
    "finetune": Method("fine-tuning", FineTuning),
    "frozen": Method("frozen body", FrozenBody),
    "ewc": Method("online EWC", EWC, "strength", (3, 10, 30, 100)),
    "si": Method("SI", SI, "strength", (0.01, 0.1, 1, 10)),
    "mas": Method("MAS", MAS, "strength", (0.001, 0.01, 0.1, 1)),
    "lwf": Method("LwF", LwF, "strength", (0.1, 0.3, 1, 3)),
    "gpm": Method("GPM", GPM, "threshold", (0.9, 0.95, 0.97, 0.99)),
    "blip": Method("BLIP", BLIP),
    "blip-kronecker": Method("BLIP, Kronecker", partial(BLIP, basis="kronecker")),
    "blip-paper": Method("BLIP, as published", BLIP.paper),
    # All tasks at once: there is nothing to forget.
    "joint": Method("joint training", FineTuning),
    # A network a task: nothing to forget, and nothing shared.
    "single": Method("single-task runs", FineTuning),
}
