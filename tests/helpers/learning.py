"""Small streams that the baselines learn, with a Trainer and by hand."""

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

NetWithHeads = partial(Net, heads=3)


def learn(
    *callbacks: pl.Callback,
    folder: Path,
    net: Callable[[], pl.LightningModule] = Net,
    stream: pl.LightningDataModule | None = None,
    ckpt_path: Path | None = None,
    **options: Any,
) -> pl.LightningModule:
    """Train a network on three pairs of classes, or on another stream, and return it."""
    torch.manual_seed(0)
    module = net()
    trainer = pl.Trainer(**{**QUIET, **options}, callbacks=list(callbacks), default_root_dir=folder)
    trainer.fit(module, datamodule=stream or pairs(), ckpt_path=ckpt_path)
    return module


def permuted(**options: Any) -> TaskSequenceDataModule:
    """Return three tasks with the same classes and permuted inputs."""
    options = {"epochs_per_task": 10, "batch_size": 16, **options}
    return TaskSequenceDataModule.permute_inputs(blobs(), blobs(seed=1), tasks=3, **options)


def disturb(module: pl.LightningModule) -> None:
    """Add a small random displacement to every parameter."""
    with torch.no_grad():
        for theta in module.parameters():
            theta += 0.1 * torch.randn_like(theta)


def added_gradients(method: pl.Callback, module: pl.LightningModule) -> dict[str, Tensor]:
    """Return what a method adds to gradients of zero, by parameter name."""
    for theta in module.parameters():
        theta.grad = torch.zeros_like(theta)
    method.on_before_optimizer_step(None, module, None)
    return {name: theta.grad for name, theta in module.named_parameters()}


class ByHand(Protocol):
    """A method written out: what it adds to the loss, and what it keeps."""

    def penalty(self, module: pl.LightningModule, x: Tensor) -> Tensor:
        """Return what is added to the loss of a batch with the inputs x."""

    def end_step(self, module: pl.LightningModule, before: list[Tensor], gradients: list[Tensor]) -> None:
        """Take the parameters before a step, and the gradients of the task's loss there."""

    def end_task(self, module: pl.LightningModule, stream: TaskSequenceDataModule) -> None:
        """Take the network at the end of a task."""


def learn_by_hand(method: ByHand, net: Callable[[], pl.LightningModule]) -> pl.LightningModule:
    """Train a network on three pairs of classes in a plain loop, and return it."""
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
