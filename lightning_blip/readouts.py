"""What BLIP can be asked about the tasks that it has learned."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_blip.frozen.base import FrozenState
from lightning_blip.memory import Memory
from lightning_blip.tasks.norm_stats import NormStats


class Readouts:
    """The part of :class:`lightning_blip.BLIP` that reads its memory and changes nothing."""

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
