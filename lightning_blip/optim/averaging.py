"""The mean of a network's weights over the end of a task."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class MeanWeights:
    """A running mean of everything that training moves: parameters, and buffers of floating point.

    SGD ends somewhere around a minimum; the mean of where it was lies nearer to it, for this task and for
    the past ones that the pull keeps near. It takes the memory of the network once more while it is running.

    Attributes:
        count: How many states the mean is of.

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
        """Takes in what a network is like now."""
        self.count += 1
        values = _moving(module)
        if self.count == 1:
            self._mean = {name: value.clone() for name, value in values.items()}
        else:
            torch._foreach_lerp_(list(self._mean.values()), list(values.values()), 1 / self.count)

    @torch.no_grad()
    def put_in_place(self, module: nn.Module) -> None:
        """Gives a network the mean, if there is one, and forgets it."""
        for name, value in _moving(module).items():
            if name in self._mean:
                value.copy_(self._mean[name])
        self.count, self._mean = 0, {}

    def state_dict(self) -> dict[str, Any]:
        """The mean so far."""
        return {"count": self.count, "mean": self._mean}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from what was saved."""
        self.count, self._mean = state_dict["count"], state_dict["mean"]


def _moving(module: nn.Module) -> dict[str, Tensor]:
    parameters = {name: theta.detach() for name, theta in module.named_parameters() if theta.requires_grad}
    buffers = {name: buffer for name, buffer in module.named_buffers() if buffer.is_floating_point()}
    return {**parameters, **buffers}
