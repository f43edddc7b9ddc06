"""How the tests of the baselines learn a small stream."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_blip import TaskHeads, TaskSequenceDataModule
from tests.helpers.networks import QUIET, Net, blobs, pairs

HeadATask = partial(Net, heads=3)


def learn(
    *callbacks: pl.Callback,
    folder: Path,
    net: Callable[[], pl.LightningModule] = Net,
    stream: TaskSequenceDataModule | None = None,
    ckpt_path: Path | None = None,
    **options: Any,
) -> pl.LightningModule:
    """The network that has learned three pairs of classes, or another stream."""
    torch.manual_seed(0)
    module = net()
    trainer = pl.Trainer(**{**QUIET, **options}, callbacks=list(callbacks), default_root_dir=folder)
    trainer.fit(module, datamodule=stream or pairs(), ckpt_path=ckpt_path)
    return module


def permuted(**options: Any) -> TaskSequenceDataModule:
    """Three times the same classes, their inputs permuted."""
    options = {"epochs_per_task": 10, "batch_size": 16, **options}
    return TaskSequenceDataModule.permute_inputs(blobs(), blobs(seed=1), tasks=3, **options)


def disturb(module: pl.LightningModule) -> None:
    """Moves every parameter a little, each by another amount."""
    with torch.no_grad():
        for theta in module.parameters():
            theta += 0.1 * torch.randn_like(theta)


def added_gradients(method: pl.Callback, module: pl.LightningModule) -> dict[str, Tensor]:
    """What a method adds to gradients of zero, by parameter name."""
    for theta in module.parameters():
        theta.grad = torch.zeros_like(theta)
    method.on_before_optimizer_step(None, module, None)
    return {name: theta.grad for name, theta in module.named_parameters()}


class ByHand(Protocol):
    """A method as one would write it down: what it adds to the loss, and what it notes."""

    def penalty(self, module: pl.LightningModule, x: Tensor) -> Tensor:
        """Added to the loss of a batch with the inputs x."""

    def end_step(self, module: pl.LightningModule, before: list[Tensor], gradients: list[Tensor]) -> None:
        """After a step: the parameters before it, and the gradients of the task's loss there."""

    def end_task(self, module: pl.LightningModule, stream: TaskSequenceDataModule) -> None:
        """After a task."""


def learn_by_hand(method: ByHand, net: Callable[[], pl.LightningModule]) -> pl.LightningModule:
    """The network that has learned three pairs of classes in a plain loop."""
    torch.manual_seed(0)
    module, stream = net(), pairs()
    for task in stream.tasks:
        if isinstance(module.head, TaskHeads):
            module.head.active = task.index
        optimizer = module.configure_optimizers()
        module.zero_grad()
        for _ in range(stream.epochs[task.index]):
            for x, y in stream.train_dataloader():
                parameters = list(module.body.parameters())
                before = [theta.detach().clone() for theta in parameters]
                gradients = torch.autograd.grad(F.cross_entropy(module(x), y), parameters)
                optimizer.zero_grad()
                (F.cross_entropy(module(x), y) + method.penalty(module, x)).backward()
                optimizer.step()
                method.end_step(module, before, list(gradients))
            stream.end_epoch()
        method.end_task(module, stream)
        stream.next_task()
    return module
