"""Synaptic Intelligence: what has lowered the loss along the way stays."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from benchmarks.baselines.parameters import beside, tracked
from benchmarks.baselines.quadratic import QuadraticPenalty, copies, gradients
from lightning_blip import Task
from lightning_blip.optim.optimizer import check_strengths


class SI(QuadraticPenalty):
    """Synaptic Intelligence: task t minimises L_t(θ) + c · Σ_i Ω_i · (θ_i − θ*_i)².

    Each task adds max(0, ω_i) / (Δ_i² + ξ) to Ω_i, where Δ_i is how far the task has moved the parameter, and
    ω_i = −Σ g_i · δ_i how much this has lowered its loss: a sum over the steps of training, of the gradient g
    of the task's own loss, without the penalty, before the step, and of the change δ that the optimizer then
    really made. θ* are the parameters of the last boundary. Tracked are all trainable parameters but those
    inside ``TaskHeads``.

    Args:
        strength: c.
        damping: ξ.

    Raises:
        ValueError: If one of them is negative.

    Source:
        Zenke, Poole and Ganguli, Continual Learning Through Synaptic Intelligence, ICML 2017, equations 3 to
        5. That ω_i < 0 counts as 0 is not in it: a negative importance would push the parameter away.
    """

    def __init__(self, strength: float = 1.0, damping: float = 0.1) -> None:
        check_strengths(strength=strength, damping=damping)
        super().__init__(stiffness=2 * strength)
        self.strength = strength
        self.damping = damping
        self._path: dict[str, Tensor] = {}  # ω
        self._before: list[Tensor] = []  # a step: parameters, and their gradients of the task's loss
        self._gradients: list[Tensor] = []

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Finds the parameters, and where a task begins, begins its sum."""
        super().on_task_start(trainer, pl_module, task)
        parameters = tracked(pl_module)
        self._path = beside(parameters, self._path) or {
            name: torch.zeros_like(theta, requires_grad=False) for name, theta in parameters.items()
        }
        # What the first task moves is measured from where the network began.
        self._anchor = self._anchor or copies(parameters)

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Notes the loss's gradient, then adds the penalty's."""
        self._before = [theta.clone() for theta in self._parameters]
        self._gradients = [gradient.clone() for gradient in gradients(self._parameters)]
        super().on_before_optimizer_step(trainer, pl_module, optimizer)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Takes in the step, if the batch made one: its gradients may be accumulated with those of others."""
        if self._before:
            change = torch._foreach_sub(self._parameters, self._before)
            torch._foreach_addcmul_(list(self._path.values()), self._gradients, change, value=-1.0)
            self._before, self._gradients = [], []

    @torch.no_grad()
    def importance(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> dict[str, Tensor]:
        """How much each parameter has lowered the loss, for how far it went."""
        importance = {
            name: self._path[name].clamp(min=0.0) / ((theta - self._anchor[name]).square() + self.damping)
            for name, theta in tracked(pl_module).items()
        }
        self._path = {}
        return importance

    def state_dict(self) -> dict[str, Any]:
        """What was learned, with the sum so far: goes into every checkpoint."""
        return {**super().state_dict(), "path": self._path}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from what was saved."""
        super().load_state_dict(state_dict)
        self._path = state_dict["path"]
