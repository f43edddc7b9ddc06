"""Running statistics of normalisation layers: those of each task kept, or the first task's held."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

NormStats = Literal["per_task", "freeze", "shared"]
Statistics = dict[str, Tensor]


class TaskStatistics:
    """The running statistics of each task; those of one at a time are in place in the network.

    They are in place for the task being learned, unless those of a learned one are shown. The kept ones
    never change: where a network was trained on while a learned task was shown, what it has then are the
    statistics of the task being learned.

    Example:
        >>> network = nn.BatchNorm1d(1)
        >>> statistics = TaskStatistics()
        >>> _ = network(torch.tensor([[9.0], [11.0]]))
        >>> statistics.keep(network, task=0)
        >>> _ = network(torch.tensor([[-9.0], [-11.0]]))
        >>> statistics.show(network, task=0)
        >>> network.running_mean
        tensor([1.])
        >>> statistics.back(network)
        >>> network.running_mean
        tensor([-0.1000])
    """

    def __init__(self) -> None:
        self._kept: dict[int, Statistics] = {}
        self._shown: int | None = None
        self._set_aside: Statistics = {}

    def keep(self, module: nn.Module, task: int) -> None:
        """Ends a task: what is in place is kept as its own, and the next one goes on from there.

        Args:
            module: The network.
            task: The task's index.
        """
        if statistics := _read(module):
            self._kept[task] = statistics
        for name, buffer in _buffers(module):
            if name.endswith("num_batches_tracked"):
                # A cumulative average (momentum=None) would count the batches of this task in the next.
                buffer.zero_()

    def show(self, module: nn.Module, task: int) -> None:
        """Puts the statistics of a learned task in place; those being learned for any other task.

        Args:
            module: The network.
            task: The task's index.
        """
        if task == self._shown:
            return
        self.back(module)
        if task in self._kept:
            self._set_aside = _read(module)
            _write(module, self._kept[task])
            self._shown = task

    def back(self, module: nn.Module) -> None:
        """Puts the statistics of the task being learned in place again.

        Args:
            module: The network.
        """
        if self._shown is not None and _same(_read(module), self._kept[self._shown]):
            _write(module, self._set_aside)
        self._shown, self._set_aside = None, {}

    def state_dict(self) -> dict[str, Any]:
        """Everything that is not in place in the network."""
        return {"kept": dict(self._kept), "shown": self._shown, "set_aside": self._set_aside}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what was saved together with the network."""
        self._kept = dict(state["kept"])
        self._shown = state["shown"]
        self._set_aside = state["set_aside"]


def freeze(module: nn.Module) -> None:
    """Has normalisation layers use their running statistics, and keep them, in training, too.

    Their weights and biases still train. It holds through any later call of ``train()``, and in copies.

    Args:
        module: The network.

    Example:
        >>> network = nn.BatchNorm1d(1)
        >>> freeze(network)
        >>> _ = network.train()(torch.tensor([[9.0], [11.0]]))
        >>> network.running_mean
        tensor([0.])
    """
    for layer in _layers(module).values():
        # Not a hook on the forward pass: torch.compile does not see one that comes after it.
        layer.train = partial(_evaluate, layer)  # type: ignore[method-assign]
        layer.eval()


def thaw(module: nn.Module) -> None:
    """Undoes :func:`freeze`.

    Args:
        module: The network.

    Example:
        >>> network = nn.Sequential(nn.BatchNorm1d(1))
        >>> freeze(network)
        >>> thaw(network)
        >>> _ = network(torch.tensor([[9.0], [11.0]]))
        >>> network[0].running_mean
        tensor([1.])
    """
    for layer in _layers(module).values():
        train = vars(layer).get("train")
        if isinstance(train, partial) and train.func is _evaluate:
            del layer.train
            layer.train(module.training)


def _evaluate(layer: _NormBase, mode: bool = True) -> _NormBase:  # noqa: ARG001
    """Stands in for the ``train`` of a layer that stays in evaluation mode."""
    layer.training = False
    return layer


def _layers(module: nn.Module) -> dict[str, _NormBase]:
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, _NormBase) and layer.running_mean is not None
    }


def _buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, layer in _layers(module).items():
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            yield f"{prefix}.{name}", getattr(layer, name)


@torch.inference_mode(False)  # a clone made in inference mode could not be changed outside of it
def _read(module: nn.Module) -> Statistics:
    return {name: buffer.detach().clone() for name, buffer in _buffers(module)}


@torch.no_grad()
def _write(module: nn.Module, statistics: Statistics) -> None:
    for name, buffer in _buffers(module):
        buffer.copy_(statistics[name])


def _same(a: Statistics, b: Statistics) -> bool:
    return all(torch.equal(value, b[name].to(value.device)) for name, value in a.items())
