"""What BLIP is measured against: methods as callbacks on the same two hooks."""

from __future__ import annotations

from typing import Any, cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_blip import Task, TaskHeads
from lightning_blip.boundaries import sequence
from lightning_blip.fisher import diagonal_fisher
from lightning_blip.optimizer import check_strengths


class FineTuning(pl.Callback):
    """Nothing is done against forgetting: task t minimises its own loss L_t(θ), from where task t − 1 ended.

    Source:
        The lower bound of, among others, Kirkpatrick et al., PNAS 2017 ("SGD").
    """


class EWC(pl.Callback):
    """Online Elastic Weight Consolidation: task t minimises L_t(θ) + λ/2 · Σ_i F_i · (θ_i − θ*_i)².

    F is the sum of the diagonal Fisher information of all tasks before, each measured at its end with labels
    drawn from the network's own prediction; θ* are the parameters of the last boundary. The gradient of the
    penalty, λ · F · (θ − θ*), is added to that of the loss before each step. Tracked are all trainable
    parameters but those inside ``TaskHeads``.

    Args:
        strength: λ.
        samples: How many training samples of a task are used to estimate its Fisher information.

    Raises:
        ValueError: If the strength is negative.

    Source:
        Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks, PNAS 2017, equation 3; one
        penalty around the last parameters for all tasks: Huszár, Note on the quadratic penalties in elastic
        weight consolidation, PNAS 2018, and Schwarz et al., Progress & Compress, ICML 2018, with γ = 1.
    """

    def __init__(self, strength: float = 10.0, samples: int = 8_000) -> None:
        check_strengths(strength=strength)
        self.strength = strength
        self.samples = samples
        self.tasks_learned = 0
        self._fisher: dict[str, Tensor] = {}
        self._anchor: dict[str, Tensor] = {}
        self._parameters: list[Tensor] = []  # those of both, in their order

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Finds the parameters that earlier tasks told about."""
        parameters = dict(pl_module.named_parameters())
        self._parameters = [parameters[name] for name in self._fisher]

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Adds the penalty's gradient."""
        if not self._parameters:
            return
        gradients = [cast(Tensor, theta.grad) for theta in self._parameters]
        drift = torch._foreach_sub(self._parameters, list(self._anchor.values()))
        torch._foreach_addcmul_(gradients, list(self._fisher.values()), drift, value=self.strength)

    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Takes in the task that was just learned."""
        parameters = _tracked(pl_module)
        fisher = diagonal_fisher(
            pl_module,
            sequence(trainer).train_dataloader(),
            samples=self.samples,
            generator=torch.Generator().manual_seed(self.tasks_learned),
            parameters=parameters,
        )
        self._fisher = {name: self._fisher.get(name, 0.0) + fisher[name] for name in parameters}
        self._anchor = {name: theta.detach().clone() for name, theta in parameters.items()}
        self.tasks_learned += 1

    def state_dict(self) -> dict[str, Any]:
        """What was learned: goes into every checkpoint."""
        return {"tasks_learned": self.tasks_learned, "fisher": self._fisher, "anchor": self._anchor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from what was saved."""
        self.tasks_learned = state_dict["tasks_learned"]
        self._fisher = state_dict["fisher"]
        self._anchor = state_dict["anchor"]


def _tracked(module: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters outside heads per task, by name."""
    heads = {theta for part in module.modules() if isinstance(part, TaskHeads) for theta in part.parameters()}
    return {
        name: theta for name, theta in module.named_parameters() if theta.requires_grad and theta not in heads
    }
