"""Synaptic Intelligence: a quadratic penalty weighted by how much each parameter lowered the loss."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_blip.baselines.parameters import beside
from lightning_blip.baselines.quadratic import QuadraticPenalty, copies, gradients_of
from lightning_blip.optim.optimizer import check_strengths
from lightning_blip.tasks.heads import shared_parameters
from lightning_blip.tasks.task import Task


class SI(QuadraticPenalty):
    """Synaptic Intelligence: task t minimises L_t(θ) + c · Σ_i Ω_i · (θ_i − θ*_i)².

    Each task adds max(0, ω_i) / (Δ_i² + ξ) to Ω_i. Δ_i is the parameter's displacement over the task.
    ω_i = −Σ g_i · δ_i is how much its movement lowered the task's loss: a sum over the training steps, where
    g is the gradient of the task's own loss before the step, without the penalty and before gradient
    clipping, and δ the change that the optimizer made. θ* are the parameters at the last boundary. All
    trainable parameters outside ``TaskHeads`` are protected.

    Any loss, batch and forward pass will do, since nothing is measured apart from training. The state is
    three values per parameter, Ω, θ* and ω, for any number of tasks; in a step there are two more.

    Args:
        strength: c, 0 or more.
        damping: ξ, above 0.

    Raises:
        ValueError: If ``strength`` is negative or ``damping`` is not positive. In a fit: if there are several
            optimizers or processes.

    Example:
        >>> from lightning_blip import ForgettingCurves
        >>> from lightning_blip.baselines import SI
        >>> trainer = pl.Trainer(
        ...     callbacks=[SI(strength=1.0), ForgettingCurves("val_acc")],
        ...     logger=False,
        ...     enable_checkpointing=False,
        ... )

    Source:
        Zenke, Poole and Ganguli, Continual Learning Through Synaptic Intelligence, ICML 2017, equations 3 to
        5. That ω_i < 0 counts as 0 is not in it: a negative importance would push the parameter away.
    """

    def __init__(self, strength: float = 1.0, damping: float = 0.1) -> None:
        check_strengths(strength=strength)
        if not damping > 0:
            raise ValueError(
                f"damping={damping} must be positive: 0 divides by 0 where a parameter did not move"
            )
        super().__init__(stiffness=2 * strength)
        self.strength = strength
        self.damping = damping
        self._path: dict[str, Tensor] = {}  # ω
        # Of the step that is being taken: the parameters before it, and the gradients of the task's loss.
        self._before: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Find the protected parameters; start ω at 0 unless the fit resumed within the task."""
        super().on_task_start(trainer, pl_module, task)
        self._path = beside(self._parameters, self._path) or {
            name: torch.zeros_like(theta, requires_grad=False) for name, theta in self._parameters.items()
        }
        # The displacement over the first task is measured from the initial parameters.
        self._anchor = self._anchor or copies(self._parameters)

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Copy the parameters and the loss's gradient, then add the penalty's gradient."""
        self._add_step()  # a module that steps its optimizer by hand may take several steps per batch
        gradients = gradients_of(self._parameters)
        self._gradients = copies(gradients)
        self._before = copies({name: self._parameters[name] for name in gradients})
        super().on_before_optimizer_step(trainer, pl_module, optimizer)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the batch's step to ω, unless the batch only accumulated gradients."""
        self._add_step()

    @torch.no_grad()
    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> dict[str, Tensor]:
        """Return max(0, ω) / (Δ² + ξ), and forget ω."""
        importance = {
            name: self._path[name].clamp(min=0.0) / ((theta - self._anchor[name]).square() + self.damping)
            for name, theta in shared_parameters(pl_module).items()
        }
        self._path = {}
        return importance

    def state_dict(self) -> dict[str, Any]:
        """Return Ω, θ* and ω, for the checkpoint."""
        return {**super().state_dict(), "path": self._path}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore Ω, θ* and ω from a checkpoint."""
        super().load_state_dict(state_dict)
        self._path = state_dict["path"]

    def _add_step(self) -> None:
        if not self._before:
            return
        after, paths = (
            [tensors[name] for name in self._before] for tensors in (self._parameters, self._path)
        )
        change = torch._foreach_sub(after, list(self._before.values()))
        torch._foreach_addcmul_(paths, list(self._gradients.values()), change, value=-1.0)
        self._before, self._gradients = {}, {}
