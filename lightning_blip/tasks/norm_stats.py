"""Running statistics of normalisation layers: kept per task, frozen after the first task, or shared."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from typing_extensions import Self

NormStats = Literal["per_task", "freeze", "shared"]
Statistics = dict[str, Tensor]


class TaskStatistics:
    """The running statistics of every task, of which the network holds those of one task at a time.

    The network holds the statistics of the task being learned, except while those of a learned task are
    shown. The statistics of learned tasks never change: if a network is trained while a learned task is
    shown, its statistics from then on belong to the task being learned.

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
        """Keep a copy of the network's statistics for a task; the next task starts from the same values.

        Args:
            module: The network.
            task: The index of the task that was just learned.
        """
        if statistics := _read(module):
            self._kept[task] = statistics
        for name, buffer in _buffers(module):
            if name.endswith("num_batches_tracked"):
                # A cumulative average (momentum=None) would count the batches of this task in the next.
                buffer.zero_()

    def show(self, module: nn.Module, task: int) -> None:
        """Write a learned task's statistics into the network; for any other task those being learned.

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
        """Write the statistics of the task being learned into the network again.

        Args:
            module: The network.
        """
        if self._shown is not None and _same(_read(module), self._kept[self._shown]):
            _write(module, self._set_aside)
        self._shown, self._set_aside = None, {}

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics that the network does not hold, and which task is shown."""
        return {"kept": dict(self._kept), "shown": self._shown, "set_aside": self._set_aside}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that was saved together with the network."""
        self._kept = dict(state["kept"])
        self._shown = state["shown"]
        self._set_aside = state["set_aside"]


def freeze(module: nn.Module) -> None:
    """Freeze the running statistics of normalisation layers: training uses them and does not update them.

    Their weights and biases still train. The layers stay frozen when ``train()`` is called later, and in
    copies: until :func:`thaw`, each layer's class is a subclass that stays in evaluation mode.

    Args:
        module: The network.

    Example:
        >>> network = nn.BatchNorm1d(1)
        >>> freeze(network)
        >>> type(network).__name__
        'EvaluationOnlyBatchNorm1d'
        >>> _ = network.train()(torch.tensor([[9.0], [11.0]]))
        >>> network.running_mean
        tensor([0.])
    """
    for layer in _layers(module).values():
        kind: Any = type(layer)
        if not issubclass(kind, _EvaluationOnly):
            # Not a hook on the forward pass: a network that is compiled already would not see it.
            layer.__class__ = _evaluation_only(kind)
        layer.train(layer.training)


def thaw(module: nn.Module) -> None:
    """Undo :func:`freeze`.

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
        if isinstance(layer, _EvaluationOnly):
            layer.__class__ = _original(type(layer))
            layer.train(module.training)


class _EvaluationOnly(nn.Module):
    """Base class that is added to the class of a frozen layer."""

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.training = False
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickle finds classes by name, but this one is made at run time.
        return _new_evaluation_only, (_original(type(self)),), self.__dict__


@lru_cache
def _evaluation_only(kind: Any) -> Any:
    return type(f"EvaluationOnly{kind.__name__}", (_EvaluationOnly, kind), {})


def _original(kind: Any) -> Any:
    return kind.__bases__[1]


def _new_evaluation_only(kind: Any) -> Any:
    return kind.__new__(_evaluation_only(kind))


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
