"""The part of BLIP that works without a Trainer: reading what is frozen, and loops of your own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytorch_lightning as pl
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_blip.boundary import BoundaryReport
from lightning_blip.frozen.base import FrozenState
from lightning_blip.memory import Memory
from lightning_blip.optim.optimizer import FrozenBitsOptimizer
from lightning_blip.tasks.norm_stats import NormStats
from lightning_blip.trainer.task_batches import TaskBatches


class ByHand:
    """The methods of :class:`lightning_blip.BLIP` that need no Trainer."""

    scale: float
    every: int
    last_boundary: BoundaryReport | None
    _memory: Memory

    def bits(self) -> dict[str, Tensor]:
        """Return the number of frozen leading bits of each parameter: uint8, by parameter name.

        A layer in the Kronecker basis has one entry, by its weight: the bits of each coordinate, (out, in),
        or (out, in + 1) with a bias.
        """
        return self._memory.network.bits()

    def precision(self) -> dict[str, Tensor]:
        """Return S_t of the exact rule, or F_{0:t} of the paper's: float32, by name, as :meth:`bits`."""
        return self._memory.network.precision()

    def state(self, parameter: str) -> FrozenState:
        """Return what is frozen in one parameter, alone or together with others of its layer.

        Args:
            parameter: The name of the parameter.

        Raises:
            KeyError: If the parameter is not tracked.

        Example:
            >>> import torch
            >>> from lightning_blip import BLIP
            >>> network, blip = nn.Linear(4, 2), BLIP()
            >>> report = blip.consolidate(network, [(torch.randn(8, 4), torch.zeros(8))])
            >>> blip.state("weight").tasks
            1
        """
        return self._memory.network.state_of(parameter)

    @property
    def used_capacity(self) -> float:
        """The share of all bits that are frozen, Σ bits / Σ N, 0 to 1."""
        return self._memory.network.used_capacity

    @property
    def chosen(self) -> dict[str, float]:
        """The prior, pull and damping in use: as given, or as chosen at the first boundary."""
        return self._memory.chosen

    @property
    def norm_stats_in_use(self) -> NormStats | None:
        """``norm_stats`` as given, or as chosen for the network."""
        return self._memory.norm_stats

    @property
    def tasks_learned(self) -> int:
        """The number of tasks consolidated."""
        return self._memory.tasks_learned

    def predicted_forgetting(self, module: nn.Module) -> float:
        """Return the predicted forgetting since the last boundary, from the information alone.

        Use it to compare moments and tasks of one run. As an amount it is too low: in the Kronecker basis by
        the part beyond second order, in the diagonal basis by far, because it ignores correlations.

        Args:
            module: The network.

        Returns:
            ½·Σ (S_t − S_0)·(θ − θ*)²/t, the rise of the past tasks' loss to second order, in nats per sample.

        Example:
            >>> import torch
            >>> from lightning_blip import BLIP
            >>> network, blip = nn.Linear(4, 2), BLIP()
            >>> report = blip.consolidate(network, [(torch.randn(8, 4), torch.zeros(8))])
            >>> before = blip.predicted_forgetting(network)
            >>> network.weight.data += 0.1
            >>> blip.predicted_forgetting(network) > before
            True
        """
        if not self.tasks_learned:
            return 0.0
        self._memory.network.attach(module, self._memory.tracked(module))
        return self._memory.network.strain(module).forgetting

    def consolidate(self, module: nn.Module | pl.Trainer, dataloader: Iterable[Any]) -> dict[str, float]:
        """Measure a task's information and freeze bits, in a loop without ``TaskSequenceDataModule``.

        Args:
            module: The network, just trained on the task, or the Trainer that trained it.
            dataloader: Batches ``(inputs, targets)`` of the task's training data, or mappings whose
                ``"labels"`` are the targets and the rest keyword arguments of the network.

        Returns:
            The metrics of the boundary by name, as they are logged in a fit.

        Raises:
            ValueError: If there are no batches, or batches of another kind.
            FloatingPointError: If the loss is not finite; nothing is consolidated then.

        Example:
            >>> import torch
            >>> from lightning_blip import BLIP
            >>> network = nn.Linear(4, 2)
            >>> blip = BLIP()
            >>> report = blip.consolidate(network, [(torch.randn(8, 4), torch.zeros(8))])
            >>> blip.tasks_learned, sorted(blip.bits())
            (1, ['bias', 'weight'])
        """
        if isinstance(module, nn.Module):
            return self._consolidate(module, TaskBatches(dataloader)).metrics()
        return self._consolidate(module.lightning_module, TaskBatches(dataloader, module)).metrics()

    def wrap(self, optimizer: Optimizer, module: nn.Module) -> FrozenBitsOptimizer:
        """Protect the parameters from an optimizer, in a loop without a Trainer.

        Args:
            optimizer: Any optimizer of the module's parameters.
            module: The network.

        Returns:
            The optimizer to step instead.

        Example:
            >>> import torch
            >>> from lightning_blip import BLIP
            >>> network = nn.Linear(4, 2)
            >>> optimizer = BLIP().wrap(torch.optim.SGD(network.parameters(), lr=0.1), network)
        """
        self._memory.attach(module)
        states = self._memory.network.by_parameters(module)
        return FrozenBitsOptimizer(optimizer, states, self.scale, self._pull_in_use, self.every)

    def use_task(self, module: nn.Module, task: int) -> None:
        """Prepare a network for the evaluation of a task, in a loop without a Trainer.

        Its running statistics are put in place (with ``norm_stats="per_task"``) and its head is made active
        in every :class:`lightning_blip.TaskHeads`. Before training goes on, call
        ``use_task(module, blip.tasks_learned)`` to return to the current task.

        Args:
            module: The network.
            task: The task's index: 0 for the first that was consolidated.

        Raises:
            ValueError: If the task is neither learned nor the current one.

        Example:
            >>> import torch
            >>> from lightning_blip import BLIP, TaskHeads
            >>> network, blip = nn.Sequential(nn.BatchNorm1d(4), TaskHeads(4, classes=[2, 2])), BLIP()
            >>> report = blip.consolidate(network, [(torch.randn(8, 4), torch.zeros(8))])
            >>> blip.use_task(network, 1)
            >>> network[1].active
            1
        """
        self._memory.use_task(module, task)

    def _consolidate(self, module: nn.Module, batches: TaskBatches, quiet: bool = False) -> BoundaryReport:
        self.last_boundary = self._memory.consolidate(module, batches, quiet)
        return self.last_boundary

    def _pull_in_use(self) -> float:
        return self.chosen.get("pull", 0.0)
