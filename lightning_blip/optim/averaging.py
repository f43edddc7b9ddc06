"""The mean of a network's weights over the last steps of a task."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class MeanWeights:
    """A running mean of everything that training changes: parameters and floating-point buffers.

    SGD ends at some distance from a minimum, and the mean of its last steps is nearer to it. This holds for
    the current task, and for the past tasks that the pull remembers. While it is in use, the mean takes as
    much memory as the network.

    Attributes:
        count: The number of states that the mean is of.

    Example:
        >>> network, mean = nn.Linear(1, 1), MeanWeights()
        >>> for value in (1.0, 2.0):
        ...     network.weight.data[:] = value
        ...     mean.add(network)
        >>> mean.put_in_place(network)
        >>> network.weight.data
        tensor([[1.5000]])

    Source:
        Polyak and Juditsky, Acceleration of stochastic approximation by averaging, SIAM J. Control Optim.
        1992; for networks: Izmailov et al., Averaging weights leads to wider optima and better
        generalization, UAI 2018.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, module: nn.Module) -> None:
        """Add the present state of a network.

        Args:
            module: The network, the same at each call.
        """
        self.count += 1
        values = _moving(module)
        if self.count == 1:
            self._mean = {name: value.clone() for name, value in values.items()}
        else:
            torch._foreach_lerp_(list(self._mean.values()), list(values.values()), 1 / self.count)

    @torch.no_grad()
    def put_in_place(self, module: nn.Module) -> None:
        """Set a network to the mean and start from nothing again; without a state, do nothing.

        Args:
            module: The network whose states were added.
        """
        for name, value in _moving(module).items():
            if name in self._mean:
                value.copy_(self._mean[name])
        self.count, self._mean = 0, {}

    def state_dict(self) -> dict[str, Any]:
        """Return the mean and the number of states, for a checkpoint."""
        return {"count": self.count, "mean": self._mean}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.count, self._mean = state_dict["count"], state_dict["mean"]


def _moving(module: nn.Module) -> dict[str, Tensor]:
    """Return the trainable parameters and the floating-point buffers by name."""
    parameters = {name: theta.detach() for name, theta in module.named_parameters() if theta.requires_grad}
    buffers = {name: buffer for name, buffer in module.named_buffers() if buffer.is_floating_point()}
    return {**parameters, **buffers}
