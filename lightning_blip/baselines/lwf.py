"""Learning without Forgetting: distillation from the network of the last boundary, on new inputs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from copy import deepcopy
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_blip.baselines.base import Baseline, check_full_precision, part_of
from lightning_blip.optim.optimizer import check_strengths
from lightning_blip.tasks.heads import TaskHeads
from lightning_blip.tasks.task import Task


class LwF(Baseline):
    """Learning without Forgetting: task t minimises L_t(θ) + λ · T² · KL(p* ‖ p).

    p and p* are softmax(z/T) of the logits z that the network, and a frozen copy of it made at the last
    boundary, give for the inputs of the current batch: with ``TaskHeads`` through the head of each old task,
    otherwise through the shared head. The divergence is averaged over samples and over old heads, and added
    to the loss. It uses the features that the body computed in ``training_step``, so that the batch does not
    pass through the network twice.

    The module must compute ``head(body(x))`` in ``training_step``, with one tensor x, to logits of shape
    (batch, classes); ``training_step`` must call ``body`` itself, or ``forward`` that calls it. The state is
    a copy of body and head, for any number of tasks.

    Args:
        strength: λ, 0 or more.
        temperature: T, above 0.
        body: The name of the part of the module that computes features.
        head: The name of the part that computes logits: a layer, or ``TaskHeads``.

    Raises:
        ValueError: If ``strength`` is negative or ``temperature`` is not positive. In a fit: if the module
            has no such parts or does not use them as described, the logits are not (batch, classes), there
            are several optimizers or processes, or the Trainer is in mixed precision.

    Example:
        >>> from lightning_blip import ForgettingCurves
        >>> from lightning_blip.baselines import LwF
        >>> trainer = pl.Trainer(
        ...     callbacks=[LwF(strength=1.0, body="encoder"), ForgettingCurves("val_acc")],
        ...     logger=False,
        ...     enable_checkpointing=False,
        ... )

    Source:
        Li and Hoiem, Learning without Forgetting, ECCV 2016, section 3; the factor T²: Hinton et al.,
        Distilling the Knowledge in a Neural Network, 2015, section 2; through a shared head: van de Ven and
        Tolias, Three scenarios for continual learning, 2019.
    """

    def __init__(
        self, strength: float = 1.0, temperature: float = 2.0, body: str = "body", head: str = "head"
    ) -> None:
        check_strengths(strength=strength)
        if not temperature > 0:
            raise ValueError(f"temperature={temperature} must be positive: it divides the logits")
        self.strength = strength
        self.temperature = temperature
        self.body = body
        self.head = head
        self._teacher: nn.ModuleList | None = None
        self._saved: dict[str, Tensor] = {}  # the teacher's weights in a checkpoint, until it is rebuilt
        self._tasks = 0
        self._batches_per_step = 1
        self._seen: tuple[Tensor, ...] = ()  # the last input of the body, and its features
        self._logits: Any = None  # the last output of the head
        self._hooks = ExitStack()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the parts of the module and the precision."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._parts(pl_module)
            check_full_precision("LwF", trainer)
            self._batches_per_step = trainer.accumulate_grad_batches

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Rebuild the copy from a checkpoint, if the fit resumed, and observe body and head."""
        self._tasks = task.index
        body, head = self._parts(pl_module)
        if self._saved:
            self._teacher = _frozen_copy(body, head)
            self._teacher.load_state_dict(self._saved)
            self._saved = {}
        self._hooks.enter_context(body.register_forward_hook(self._note_features))
        self._hooks.enter_context(head.register_forward_hook(self._note_logits))

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Add the divergence to the loss, in place."""
        self._check_use(pl_module)
        if self._teacher is None:
            return
        old_body, old_head = self._teacher
        x, features = self._seen
        _, head = self._parts(pl_module)
        targets = old_logits(old_head, old_body(x), self._tasks)
        logits = old_logits(head, features, self._tasks)
        # The loss is already divided by the number of batches whose gradients are accumulated.
        strength = self.strength / self._batches_per_step
        loss += strength * distillation(logits, targets, self.temperature)

    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Replace the copy by the network as it is now."""
        self._release()
        self._teacher = _frozen_copy(*self._parts(pl_module))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remove the hooks."""
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """Return the weights of the copy, for the checkpoint."""
        return {"learned": self._saved if self._teacher is None else self._teacher.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the weights of the copy from a checkpoint."""
        self._saved = state_dict["learned"]

    def _parts(self, pl_module: pl.LightningModule) -> tuple[nn.Module, nn.Module]:
        return part_of(pl_module, self.body, "body"), part_of(pl_module, self.head, "head")

    def _check_use(self, pl_module: pl.LightningModule) -> None:
        """Check that the training step went through body and head as the method assumes."""
        name = type(pl_module).__name__
        if not self._seen or self._logits is None:
            raise ValueError(
                f"LwF needs {name}.training_step to compute {self.head}({self.body}(x)) with one tensor x, "
                "and it did not: name the parts that it uses, LwF(body=…, head=…)"
            )
        shape = tuple(getattr(self._logits, "shape", ()))
        if len(shape) != 2 or shape[1] < 2:
            raise ValueError(
                f"LwF needs logits of shape (batch, classes) with at least 2 classes, and {name}.{self.head} "
                f"gives {shape or type(self._logits).__name__}: take a method that needs no classes, as SI"
            )

    def _release(self) -> None:
        self._hooks.close()
        self._seen, self._logits = (), None

    def _note_features(self, body: nn.Module, args: tuple[Any, ...], features: Any) -> None:
        if len(args) == 1 and isinstance(args[0], Tensor) and isinstance(features, Tensor):
            self._seen = (args[0], features)

    def _note_logits(self, head: nn.Module, args: tuple[Any, ...], logits: Any) -> None:
        self._logits = logits.detach() if isinstance(logits, Tensor) else logits


def old_logits(head: nn.Module, features: Tensor, tasks: int) -> list[Tensor]:
    """Return the logits of the heads of the first tasks, or those of a shared head.

    Each head is called by itself: activating another one in ``TaskHeads`` would delete gradients.

    Args:
        head: ``TaskHeads``, or a layer.
        features: Its inputs, (batch, features).
        tasks: The number of learned tasks.

    Returns:
        Logits (batch, classes), one tensor per head.
    """
    heads = list(head.heads)[:tasks] if isinstance(head, TaskHeads) else [head]
    return [layer(features) for layer in heads]


def distillation(logits: Sequence[Tensor], targets: Sequence[Tensor], temperature: float) -> Tensor:
    """Return T² · KL(softmax(target/T) ‖ softmax(logit/T)), averaged over samples and pairs of logits.

    Args:
        logits: Of the network, (batch, classes) each.
        targets: Of the frozen copy, of the same shapes.
        temperature: T.

    Returns:
        A scalar, in nats.

    Example:
        >>> z = torch.tensor([[1.0, 2.0]])
        >>> distillation([z], [z], temperature=2.0)
        tensor(0.)
    """
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


def _frozen_copy(body: nn.Module, head: nn.Module) -> nn.ModuleList:
    return nn.ModuleList([deepcopy(body), deepcopy(head)]).eval().requires_grad_(False)
