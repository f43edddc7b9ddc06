"""The quadratic penalty around the parameters of the last boundary, which EWC, SI and MAS share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_blip.baselines.base import Baseline
from lightning_blip.baselines.parameters import beside
from lightning_blip.tasks.heads import shared_parameters
from lightning_blip.tasks.task import Task


class QuadraticPenalty(Baseline, ABC):
    """Task t minimises L_t(θ) + k/2 · Σ_i Ω_i · (θ_i − θ*_i)².

    Ω is the sum of the importances of a parameter over all earlier tasks; θ* are the parameters at the last
    boundary. The gradient of the penalty, k · Ω · (θ − θ*), is added to that of the loss before each step.
    All trainable parameters outside ``TaskHeads`` are protected.

    Args:
        stiffness: k, 0 or more.
    """

    def __init__(self, stiffness: float) -> None:
        self._stiffness = stiffness
        self._importance: dict[str, Tensor] = {}
        self._anchor: dict[str, Tensor] = {}
        self._parameters: dict[str, Tensor] = {}

    @abstractmethod
    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> dict[str, Tensor]:
        """Return what the task that just ended adds to Ω, for each protected parameter by name."""

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Find the protected parameters."""
        self._parameters = dict(shared_parameters(pl_module))
        self._importance = beside(self._parameters, self._importance)
        self._anchor = beside(self._parameters, self._anchor)

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Add the penalty's gradient."""
        gradients = gradients_of({name: self._parameters[name] for name in self._importance})
        if not gradients:
            return
        values, anchors, importances = (
            [tensors[name] for name in gradients]
            for tensors in (self._parameters, self._anchor, self._importance)
        )
        drift = torch._foreach_sub(values, anchors)
        torch._foreach_addcmul_(list(gradients.values()), importances, drift, value=self._stiffness)

    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Add the task's importances and move the anchor."""
        learned = self._measure(trainer, pl_module, task)
        self._importance = {name: self._importance.get(name, 0.0) + learned[name] for name in learned}
        self._anchor = copies(shared_parameters(pl_module))

    def state_dict(self) -> dict[str, Any]:
        """Return Ω and θ*, for the checkpoint."""
        return {"importance": self._importance, "anchor": self._anchor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore Ω and θ* from a checkpoint."""
        self._importance = state_dict["importance"]
        self._anchor = state_dict["anchor"]


def copies(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of the parameters, by name."""
    return {name: theta.detach().clone() for name, theta in parameters.items()}


def gradients_of(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients by name, of the parameters that have one: no other is moved by an optimizer."""
    return {name: theta.grad for name, theta in parameters.items() if theta.grad is not None}
