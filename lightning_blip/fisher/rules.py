"""Layers whose per-sample gradients follow from their inputs and output gradients alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lightning_blip.fisher import conv, linear
from lightning_blip.fisher.batches import Batch
from lightning_blip.fisher.products import add_squared_products

RULES: dict[type[nn.Module], ModuleType] = {
    nn.Linear: linear,
    nn.Conv1d: conv,
    nn.Conv2d: conv,
    nn.Conv3d: conv,
}


@dataclass
class Call:
    """One use of a layer in a forward pass; ``grads``, of its output, are known after the backward."""

    inputs: Tensor
    output_shape: torch.Size
    edge: GradientEdge
    grads: Tensor | None = None


@dataclass
class RuledLayer:
    """A layer with a rule; ``names``, by role ("weight", "bias"), are its parameters to estimate."""

    path: str
    layer: nn.Module
    names: dict[str, str]
    calls: list[Call] = field(default_factory=list)

    @property
    def rule(self) -> ModuleType:
        """The rule for this type of layer."""
        return RULES[type(self.layer)]

    def record(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
    ) -> None:
        """A forward hook that keeps the call."""
        if output.requires_grad:
            # An output that is a view loses its own edge to the graph when it is changed in place.
            whole = output if output._base is None else output._base
            inputs = args[0] if args else kwargs["input"]
            self.calls.append(Call(inputs.detach(), output.shape, get_gradient_edge(whole)))

    def is_batch_first(self, size: int) -> bool:
        """Whether every call had ``size`` samples along the first dimension."""
        return all(self.rule.is_batch_first(self.layer, call.inputs, size) for call in self.calls)

    def check_batch_first(self, batch: Batch) -> None:
        """Raises an error if a call had something else than the samples along the first dimension."""
        if not self.is_batch_first(batch.size):
            shapes = ", ".join(str(tuple(call.inputs.shape)) for call in self.calls)
            raise RuntimeError(
                f"The layer {self.path!r} got inputs of shape {shapes} in batch {batch.index} of "
                f"{batch.size} samples, but had the batch along the first dimension before: give batches on "
                "which the module works in one way, or leave the layer out with parameters=[...]."
            )

    def add_squares(self, sums: Mapping[str, Tensor]) -> None:
        """Adds the samples' squared gradients to ``sums``, by parameter name."""
        if not self._used:
            return
        if "bias" in self.names:
            total = sums[self.names["bias"]]
            total += self._grads(total.dtype).sum(-1).flatten(1).square().sum(0)
        if "weight" in self.names:
            total = sums[self.names["weight"]]
            grads = self._grads(total.dtype)
            add_squared_products(total.view(*grads.shape[1:3], -1), self._inputs, grads)

    def projected(self, role: str, vector: Tensor) -> tuple[Tensor, Tensor]:
        """The summed gradient (of "weight": times ``vector``) and the sum of its terms' absolute values."""
        if not self._used:
            return vector.new_zeros(()), vector.new_zeros(())
        grads = self._grads(vector.dtype)
        if role == "bias":
            return grads.sum((0, -1)).flatten(), grads.abs().sum((0, -1)).flatten()
        factor = (vector @ self._inputs(slice(None)).to(vector.dtype)).unsqueeze(-1)
        return (grads @ factor).sum(0).flatten(), (grads.abs() @ factor.abs()).sum(0).flatten()

    @property
    def _used(self) -> list[Call]:
        return [call for call in self.calls if call.grads is not None]

    def _inputs(self, samples: slice) -> Tensor:
        # Several uses are more positions of the same samples: their gradients add up before the square.
        parts = [self.rule.inputs_by_position(self.layer, call.inputs[samples]) for call in self._used]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def _grads(self, dtype: torch.dtype) -> Tensor:
        parts = [
            self.rule.grads_by_position(self.layer, call.grads.reshape(call.output_shape))
            for call in self.calls
            if call.grads is not None
        ]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).to(dtype)


def find_layers(module: nn.Module, wanted: Mapping[str, nn.Parameter]) -> list[RuledLayer]:
    """The layers with a rule that own some of the ``wanted`` parameters."""
    name_of = {parameter: name for name, parameter in wanted.items()}
    found = []
    for path, layer in module.named_modules():
        if type(layer) in RULES:
            held = {role: layer._parameters.get(role) for role in ("weight", "bias")}
            names = {role: name_of[parameter] for role, parameter in held.items() if parameter in name_of}
            if names:
                found.append(RuledLayer(path, layer, names))
    return found


@contextmanager
def recording(layers: Sequence[RuledLayer]) -> Iterator[None]:
    """While in this context, the layers' calls are recorded, in place of those recorded before."""
    handles = []
    try:
        for ruled in layers:
            ruled.calls.clear()
            handles.append(ruled.layer.register_forward_hook(ruled.record, with_kwargs=True, prepend=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def backward(
    total: Tensor, layers: Sequence[RuledLayer], leaves: Sequence[Tensor] = ()
) -> list[Tensor | None]:
    """Gradients of ``total``: of the recorded outputs, kept in their calls, and of ``leaves``, returned."""
    calls = [call for ruled in layers for call in ruled.calls]
    sources: list[Any] = [*(call.edge for call in calls), *leaves]
    if not sources or not total.requires_grad:
        return [None] * len(leaves)
    grads = torch.autograd.grad(total, sources, allow_unused=True)
    for call, grad in zip(calls, grads[: len(calls)], strict=True):
        call.grads = grad
    return list(grads[len(calls) :])
