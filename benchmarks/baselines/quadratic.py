"""The penalty around the last parameters that EWC, SI and MAS share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, cast

import pytorch_lightning as pl
import torch
from torch import Tensor

from benchmarks.baselines.parameters import beside, tracked
from lightning_blip import Task


class QuadraticPenalty(pl.Callback, ABC):
    """Task t minimises L_t(θ) + k/2 · Σ_i Ω_i · (θ_i − θ*_i)².

    Ω is the sum of the importances that all tasks before gave to the parameters; θ* are the parameters of the
    last boundary. The gradient of the penalty, k · Ω · (θ − θ*), is added to that of the loss before each
    step. Tracked are all trainable parameters but those inside ``TaskHeads``.

    Args:
        stiffness: k.
    """

    def __init__(self, stiffness: float) -> None:
        self._stiffness = stiffness
        self._importance: dict[str, Tensor] = {}
        self._anchor: dict[str, Tensor] = {}
        self._parameters: list[Tensor] = []  # in the order of both

    @abstractmethod
    def importance(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> dict[str, Tensor]:
        """What the task that was just learned adds to Ω, by the name of each tracked parameter."""

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Finds the parameters."""
        parameters = tracked(pl_module)
        self._parameters = list(parameters.values())
        self._importance = beside(parameters, self._importance)
        self._anchor = beside(parameters, self._anchor)

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Adds the penalty's gradient."""
        if not self._importance:
            return
        drift = torch._foreach_sub(self._parameters, list(self._anchor.values()))
        torch._foreach_addcmul_(
            gradients(self._parameters), list(self._importance.values()), drift, value=self._stiffness
        )

    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Takes in the task that was just learned."""
        learned = self.importance(trainer, pl_module, task)
        self._importance = {name: self._importance.get(name, 0.0) + learned[name] for name in learned}
        self._anchor = copies(tracked(pl_module))

    def state_dict(self) -> dict[str, Any]:
        """What was learned: goes into every checkpoint."""
        return {"importance": self._importance, "anchor": self._anchor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from what was saved."""
        self._importance = state_dict["importance"]
        self._anchor = state_dict["anchor"]


def copies(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters as they are now, by name."""
    return {name: theta.detach().clone() for name, theta in parameters.items()}


def gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Of parameters that all have one."""
    return [cast(Tensor, theta.grad) for theta in parameters]
