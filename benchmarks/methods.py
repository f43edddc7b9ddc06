"""The methods that are compared, each with the setting that is searched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytorch_lightning as pl

from lightning_blip import BLIP
from lightning_blip.baselines import EWC, GPM, MAS, SI, FrozenBody, LwF


@dataclass(frozen=True)
class Method:
    """A method of the comparison.

    Attributes:
        title: Its name in tables and pictures.
        make: Makes its callback from its settings.
        setting: The setting that is searched; None if nothing is searched.
        values: The values that the search tries.
    """

    title: str
    make: Callable[..., pl.Callback]
    setting: str | None = None
    values: tuple[float, ...] = ()


#: By the name that the command line takes. A callback that does nothing stands for training without one.
METHODS: dict[str, Method] = {
    "finetune": Method("fine-tuning", pl.Callback),
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
    "joint": Method("joint training", pl.Callback),
    # One network per task: nothing is forgotten, and nothing is shared.
    "single": Method("single-task runs", pl.Callback),
}
