"""Elastic Weight Consolidation: a quadratic penalty weighted by the Fisher information."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.distributions import Distribution

from lightning_blip.baselines.base import task_batches
from lightning_blip.baselines.quadratic import QuadraticPenalty
from lightning_blip.fisher import diagonal_fisher
from lightning_blip.fisher.arguments import check_likelihood, check_samples
from lightning_blip.optim.optimizer import check_strengths
from lightning_blip.tasks.heads import shared_parameters
from lightning_blip.tasks.task import Task
from lightning_blip.trainer.task_batches import inputs_and_targets


class EWC(QuadraticPenalty):
    """Online Elastic Weight Consolidation: task t minimises L_t(θ) + λ/2 · Σ_i F_i · (θ_i − θ*_i)².

    F is the sum of the diagonal Fisher information of all earlier tasks, each measured at the end of its task
    with labels drawn from the network's own prediction. θ* are the parameters at the last boundary. All
    trainable parameters outside ``TaskHeads`` are protected. The penalty's gradient is added before each
    step, and before gradient clipping.

    The module's ``forward`` must return what ``likelihood`` reads; batches are pairs ``(inputs, targets)`` or
    mappings whose ``"labels"`` are the targets. The state is two values per parameter, F and θ*, for any
    number of tasks.

    Args:
        strength: λ, 0 or more.
        samples: The number of training samples measured per task.
        likelihood: What the output stands for: ``"categorical"`` (logits of classes), ``"gaussian"`` (a mean
            with variance 1), ``"bernoulli"`` (logits), or a callable that makes a ``torch.distributions``
            distribution of it.

    Raises:
        ValueError: If ``strength`` is negative, ``samples`` is below 1 or ``likelihood`` is unknown. In a
            fit: if there are several optimizers or processes, or the information of the first batch cannot be
            measured.

    Example:
        >>> import torch
        >>> from lightning_blip import ForgettingCurves
        >>> from lightning_blip.baselines import EWC
        >>> trainer = pl.Trainer(
        ...     callbacks=[EWC(strength=10.0), ForgettingCurves("val_acc")],
        ...     logger=False,
        ...     enable_checkpointing=False,
        ... )

    Source:
        Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks, PNAS 2017, equation 3; one
        penalty around the last parameters for all tasks: Huszár, Note on the quadratic penalties in elastic
        weight consolidation, PNAS 2018, and Schwarz et al., Progress & Compress, ICML 2018, with γ = 1.
    """

    def __init__(
        self,
        strength: float = 10.0,
        samples: int = 8_000,
        likelihood: str | Callable[[Any], Distribution] = "categorical",
    ) -> None:
        check_strengths(strength=strength)
        check_samples(samples)
        check_likelihood(likelihood)
        super().__init__(stiffness=strength)
        self.strength = strength
        self.samples = samples
        self.likelihood = likelihood

    def _try_on(self, pl_module: pl.LightningModule, batch: Any) -> None:
        """Measure the information of two samples."""
        self._fisher(pl_module, [inputs_and_targets(batch)], samples=2, seed=0)

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> dict[str, Tensor]:
        """Return the task's Fisher information."""
        return self._fisher(pl_module, task_batches(trainer), self.samples, seed=task.index)

    def _fisher(
        self, pl_module: pl.LightningModule, batches: Iterable[Any], samples: int, seed: int
    ) -> dict[str, Tensor]:
        return diagonal_fisher(
            pl_module,
            batches,
            self.likelihood,
            samples=samples,
            generator=torch.Generator().manual_seed(seed),
            parameters=shared_parameters(pl_module),
        )
