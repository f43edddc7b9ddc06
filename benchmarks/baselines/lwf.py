"""Learning without Forgetting: what the network says of new inputs stays."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.networks import Classifier
from lightning_blip import Task, TaskHeads
from lightning_blip.optimizer import check_strengths


class LwF(pl.Callback):
    """Learning without Forgetting: task t minimises L_t(θ) + λ · T² · KL(p* ‖ p).

    p* and p are softmax(z/T) of the logits z that a frozen copy of the network, made after the last task, and
    the network itself give of the inputs of the current batch: with heads per task through the head of each
    old task, else through the shared head. The divergence is averaged over samples, and over old heads. Its
    gradient is added to that of the loss before each step; it takes one more pass over the batch, in which
    dropout draws anew and running statistics of norms take the batch in again.

    Args:
        strength: λ.
        temperature: T.

    Raises:
        ValueError: If the strength is negative.

    Source:
        Li and Hoiem, Learning without Forgetting, ECCV 2016, section 3; the factor T²: Hinton et al.,
        Distilling the Knowledge in a Neural Network, 2015, section 2; through a shared head: van de Ven and
        Tolias, Three scenarios for continual learning, 2019.
    """

    def __init__(self, strength: float = 1.0, temperature: float = 2.0) -> None:
        check_strengths(strength=strength)
        self.strength = strength
        self.temperature = temperature
        self._teacher: nn.ModuleList | None = None
        self._saved: dict[str, Tensor] = {}  # what a checkpoint holds of a teacher that is yet to be made
        self._tasks = 0
        self._inputs = torch.empty(0)

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Makes the copy that a checkpoint brought, if one did."""
        self._tasks = task.index
        if self._saved:
            self._teacher = _frozen_copy(pl_module)
            self._teacher.load_state_dict(self._saved)
            self._saved = {}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Notes the inputs."""
        self._inputs = batch[0]

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Adds the divergence's gradient."""
        if self._teacher is None:
            return
        targets = old_logits(self._teacher, self._inputs, self._tasks)
        logits = old_logits(_parts(pl_module), self._inputs, self._tasks)
        penalty = self.strength * distillation(logits, targets, self.temperature)
        parameters = [theta for theta in pl_module.parameters() if theta.requires_grad]
        gradients = torch.autograd.grad(penalty, parameters, allow_unused=True)
        for theta, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                theta.grad = gradient if theta.grad is None else theta.grad + gradient

    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Keeps the network as it is now."""
        self._teacher = _frozen_copy(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The network after the last task: goes into every checkpoint."""
        return {"learned": self._saved if self._teacher is None else self._teacher.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from what was saved."""
        self._saved = state_dict["learned"]


def old_logits(parts: nn.ModuleList, x: Tensor, tasks: int) -> list[Tensor]:
    """The logits of the heads of the first tasks, or those of the shared head.

    The heads are called by themselves: to make another one active would take gradients from the others.

    Args:
        parts: A body and a head.
        x: Inputs.
        tasks: How many are learned.

    Returns:
        Logits, one tensor for each head.
    """
    body, head = parts
    features = body(x)
    heads = list(head.heads)[:tasks] if isinstance(head, TaskHeads) else [head]
    return [layer(features) for layer in heads]


def distillation(logits: Sequence[Tensor], targets: Sequence[Tensor], temperature: float) -> Tensor:
    """T² · KL(softmax(target/T) ‖ softmax(logit/T)), averaged over samples and over pairs of logits."""
    divergences = [
        F.kl_div(
            F.log_softmax(z / temperature, dim=1),
            F.log_softmax(target / temperature, dim=1),
            reduction="batchmean",
            log_target=True,
        )
        for z, target in zip(logits, targets, strict=True)
    ]
    return temperature**2 * torch.stack(divergences).mean()


def _parts(pl_module: pl.LightningModule) -> nn.ModuleList:
    classifier = cast(Classifier, pl_module)
    return nn.ModuleList([classifier.body, classifier.head])


def _frozen_copy(pl_module: pl.LightningModule) -> nn.ModuleList:
    return deepcopy(_parts(pl_module)).eval().requires_grad_(False)
