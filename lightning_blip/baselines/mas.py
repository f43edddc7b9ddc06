"""Memory Aware Synapses: a quadratic penalty weighted by the sensitivity of the outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from lightning_blip.baselines.base import task_batches
from lightning_blip.baselines.quadratic import QuadraticPenalty
from lightning_blip.fisher.arguments import check_samples
from lightning_blip.fisher.gradients import BUDGET_BYTES
from lightning_blip.fisher.isolation import left_as_before
from lightning_blip.fisher.samples import read_batches
from lightning_blip.optim.optimizer import check_strengths
from lightning_blip.tasks.heads import shared_parameters
from lightning_blip.tasks.task import Task
from lightning_blip.trainer.task_batches import inputs_and_targets


class MAS(QuadraticPenalty):
    """Memory Aware Synapses: task t minimises L_t(θ) + λ · Σ_i Ω_i · (θ_i − θ*_i)².

    Each task adds to Ω the mean over samples x of |∂‖f(x)‖²/∂θ_i|, measured at its end. The paper leaves some
    choices open. Here f(x) is the output of ``forward``, such as logits, with ``TaskHeads`` those of the
    task's own head; the gradient is that of the squared norm, per sample and not per batch; the importances
    of tasks are summed, not averaged. θ* are the parameters at the last boundary. All trainable parameters
    outside ``TaskHeads`` are protected. The penalty's gradient is added before each step, and before gradient
    clipping.

    No labels are used, so that any loss will do. ``forward`` must take one tensor, return one tensor, and
    use only operations that ``torch.func.vmap`` supports; batches are pairs ``(inputs, targets)``. The state
    is two values per parameter, Ω and θ*, for any number of tasks.

    Args:
        strength: λ, 0 or more.
        samples: The number of training samples measured per task.

    Raises:
        ValueError: If ``strength`` is negative or ``samples`` is below 1. In a fit: if there are several
            optimizers or processes, or the sensitivity on the first batch cannot be measured.

    Example:
        >>> from lightning_blip import ForgettingCurves
        >>> from lightning_blip.baselines import MAS
        >>> trainer = pl.Trainer(
        ...     callbacks=[MAS(strength=0.1), ForgettingCurves("val_acc")],
        ...     logger=False,
        ...     enable_checkpointing=False,
        ... )

    Source:
        Aljundi et al., Memory Aware Synapses: Learning what (not) to forget, ECCV 2018, section 4.1.
    """

    def __init__(self, strength: float = 1.0, samples: int = 2_000) -> None:
        check_strengths(strength=strength)
        check_samples(samples)
        super().__init__(stiffness=2 * strength)
        self.strength = strength
        self.samples = samples

    def _try_on(self, pl_module: pl.LightningModule, batch: Any) -> None:
        """Measure the sensitivity on two samples."""
        sensitivity(pl_module, shared_parameters(pl_module), [inputs_and_targets(batch)], samples=2)

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> dict[str, Tensor]:
        """Return the sensitivity of the task's outputs."""
        return sensitivity(pl_module, shared_parameters(pl_module), task_batches(trainer), self.samples)


def sensitivity(
    module: nn.Module, parameters: Mapping[str, nn.Parameter], batches: Iterable[Any], samples: int
) -> dict[str, Tensor]:
    """Return the mean over samples x of |∂‖f(x)‖²/∂θ|, in evaluation mode.

    The module's modes, buffers and gradients, and the random numbers, stay as they were.

    Args:
        module: Computes f, with operations that ``torch.func.vmap`` supports.
        parameters: θ by name.
        batches: Yields pairs ``(inputs, targets)``, the inputs a tensor (batch, …).
        samples: The largest number of samples to use.

    Returns:
        A tensor of each parameter's shape, by name.

    Raises:
        TypeError: If the inputs, or the module's output, are not a tensor.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)  # f(x)² = (w·x)², so |∂f(x)²/∂w| = 2·|w|·x²
        >>> _ = layer.weight.data.fill_(-0.5)
        >>> inputs = torch.tensor([[1.0], [3.0]])
        >>> sensitivity(layer, dict(layer.named_parameters()), [(inputs, None)], samples=2)
        {'weight': tensor([[5.]])}
    """
    values = {name: theta.detach() for name, theta in parameters.items()}
    totals = {name: torch.zeros_like(value) for name, value in values.items()}
    device = next(iter(values.values())).device

    def squared_norm(values: dict[str, Tensor], x: Tensor) -> Tensor:
        output = functional_call(module, values, x[None])
        return _tensor(output, "the network's output").square().sum()

    per_sample = vmap(grad(squared_norm), in_dims=(None, 0))
    at_once = max(1, BUDGET_BYTES // sum(value.nbytes for value in values.values()))
    done = 0
    with left_as_before(module, device, parameters.values()), torch.no_grad():
        for batch in read_batches(batches, samples, device):
            done += batch.size
            for x in _tensor(batch.inputs, "the input").split(at_once):
                for name, gradient in per_sample(values, x).items():
                    totals[name] += gradient.abs_().sum(0)
    return {name: total / done for name, total in totals.items()}


def _tensor(value: Any, what: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"MAS needs a tensor, and {what} is {type(value).__name__}: take EWC instead")
    return value
