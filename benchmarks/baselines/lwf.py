"""Learning without Forgetting: what the network says of new inputs stays."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from copy import deepcopy
from typing import Any, cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.networks import Classifier
from lightning_blip import Task, TaskHeads
from lightning_blip.optim.optimizer import check_strengths


class LwF(pl.Callback):
    """Learning without Forgetting: task t minimises L_t(θ) + λ · T² · KL(p* ‖ p).

    p* and p are softmax(z/T) of the logits z that a frozen copy of the network, made after the last task, and
    the network itself give of the inputs of the current batch: with heads per task through the head of each
    old task, else through the shared head. The divergence is averaged over samples, and over old heads, and
    is added to the loss of what the network has made of the batch already.

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
        self._seen: tuple[Tensor, ...] = ()  # the last inputs of the body, and what it made of them
        self._watches = ExitStack()

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Makes the copy that a checkpoint brought, if one did, and watches the body."""
        self._tasks = task.index
        if self._saved:
            self._teacher = _frozen_copy(pl_module)
            self._teacher.load_state_dict(self._saved)
            self._saved = {}
        self._watches.enter_context(cast(Classifier, pl_module).body.register_forward_hook(self._note))

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Adds the divergence to the loss, in place."""
        if self._teacher is None:
            return
        body, head = self._teacher
        x, features = self._seen
        targets = old_logits(head, body(x), self._tasks)
        logits = old_logits(cast(Classifier, pl_module).head, features, self._tasks)
        loss += self.strength * distillation(logits, targets, self.temperature)

    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Keeps the network as it is now."""
        self._unwatch()
        self._teacher = _frozen_copy(pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Watches no longer."""
        self._unwatch()

    def state_dict(self) -> dict[str, Any]:
        """The network after the last task: goes into every checkpoint."""
        return {"learned": self._saved if self._teacher is None else self._teacher.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from what was saved."""
        self._saved = state_dict["learned"]

    def _unwatch(self) -> None:
        self._watches.close()
        self._seen = ()

    def _note(self, body: nn.Module, args: tuple[Tensor, ...], features: Tensor) -> None:
        self._seen = (args[0], features)


def old_logits(head: nn.Module, features: Tensor, tasks: int) -> list[Tensor]:
    """The logits of the heads of the first tasks, or those of the shared head.

    The heads are called by themselves: to make another one active would take gradients from the others.

    Args:
        head: ``TaskHeads``, or a layer.
        features: Its inputs.
        tasks: How many are learned.

    Returns:
        Logits, one tensor for each head.
    """
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


def _frozen_copy(pl_module: pl.LightningModule) -> nn.ModuleList:
    classifier = cast(Classifier, pl_module)
    return nn.ModuleList([deepcopy(classifier.body), deepcopy(classifier.head)]).eval().requires_grad_(False)
