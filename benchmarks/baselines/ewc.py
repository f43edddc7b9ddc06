"""Elastic Weight Consolidation: what the Fisher information tells is important stays."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from torch import Tensor

from benchmarks.baselines.parameters import tracked
from benchmarks.baselines.quadratic import QuadraticPenalty
from lightning_blip import Task
from lightning_blip.fisher import diagonal_fisher
from lightning_blip.optim.optimizer import check_strengths
from lightning_blip.tasks.sequence import sequence


class EWC(QuadraticPenalty):
    """Online Elastic Weight Consolidation: task t minimises L_t(θ) + λ/2 · Σ_i F_i · (θ_i − θ*_i)².

    F is the sum of the diagonal Fisher information of all tasks before, each measured at its end with labels
    drawn from the network's own prediction; θ* are the parameters of the last boundary. Tracked are all
    trainable parameters but those inside ``TaskHeads``.

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
        super().__init__(stiffness=strength)
        self.strength = strength
        self.samples = samples

    def importance(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> dict[str, Tensor]:
        """The task's Fisher information."""
        return diagonal_fisher(
            pl_module,
            sequence(trainer).task_dataloader(),
            samples=self.samples,
            generator=torch.Generator().manual_seed(task.index),
            parameters=tracked(pl_module),
        )
