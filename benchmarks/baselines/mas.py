"""Memory Aware Synapses: what the outputs are sensitive to stays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks.baselines.parameters import tracked
from benchmarks.baselines.quadratic import QuadraticPenalty
from lightning_blip import Task
from lightning_blip.fisher.gradients import BUDGET_BYTES
from lightning_blip.fisher.isolation import left_as_before
from lightning_blip.fisher.samples import read_batches
from lightning_blip.optim.optimizer import check_strengths
from lightning_blip.tasks.boundaries import sequence


class MAS(QuadraticPenalty):
    """Memory Aware Synapses: task t minimises L_t(θ) + λ · Σ_i Ω_i · (θ_i − θ*_i)².

    Each task adds to Ω the mean over samples x of |∂‖f(x)‖²/∂θ_i|, measured at its end. Of the paper's
    conventions: f(x) are the logits, with heads per task those of the task's own; the gradient is that of
    their squared norm, taken for each sample by itself and not for a batch; the importances of tasks are
    summed, not averaged. θ* are the parameters of the last boundary. Tracked are all trainable parameters but
    those inside ``TaskHeads``.

    Args:
        strength: λ.
        samples: How many training samples of a task are used to estimate the sensitivity.

    Raises:
        ValueError: If the strength is negative.

    Source:
        Aljundi et al., Memory Aware Synapses: Learning what (not) to forget, ECCV 2018, section 4.1.
    """

    def __init__(self, strength: float = 1.0, samples: int = 2_000) -> None:
        check_strengths(strength=strength)
        super().__init__(stiffness=2 * strength)
        self.strength = strength
        self.samples = samples

    def importance(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> dict[str, Tensor]:
        """The sensitivity of the task's outputs."""
        batches = sequence(trainer).task_dataloader()
        return sensitivity(pl_module, tracked(pl_module), batches, self.samples)


def sensitivity(
    module: nn.Module, parameters: Mapping[str, nn.Parameter], batches: Iterable[Any], samples: int
) -> dict[str, Tensor]:
    """The mean over samples x of |∂‖f(x)‖²/∂θ|, in evaluation mode; the module is left as it was.

    Args:
        module: Computes f; it may do nothing that ``torch.func`` cannot vectorise.
        parameters: θ by name.
        batches: Yields pairs ``(inputs, targets)``, the inputs a tensor.
        samples: How many to use at most.

    Returns:
        One value for each parameter, by name.
    """
    values = {name: theta.detach() for name, theta in parameters.items()}
    totals = {name: torch.zeros_like(value) for name, value in values.items()}

    def squared_norm(values: dict[str, Tensor], x: Tensor) -> Tensor:
        output: Tensor = functional_call(module, values, x[None])
        return output.square().sum()

    of_samples = vmap(grad(squared_norm), in_dims=(None, 0))
    at_once = max(1, BUDGET_BYTES // sum(value.nbytes for value in values.values()))
    done = 0
    with left_as_before(module, next(iter(values.values())).device, parameters.values()), torch.no_grad():
        for batch in read_batches(batches, samples, next(iter(values.values())).device):
            done += batch.size
            for x in batch.inputs.split(at_once):
                for name, gradient in of_samples(values, x).items():
                    totals[name] += gradient.abs_().sum(0)
    return {name: total / done for name, total in totals.items()}
