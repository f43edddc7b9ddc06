"""Watches a forward pass for the operations in which parameters meet the samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lightning_blip.fisher.batches import tensors_of
from lightning_blip.fisher.rewrites import REWRITES
from lightning_blip.fisher.rules import RULES, SPREADS, Gradients

Key = tuple[Any, ...]


@dataclass
class Use:
    """A tensor that is, or was computed from, the parameters called ``names``, and its rule."""

    tensor: Tensor
    names: frozenset[str]
    gradients: Gradients


@dataclass(eq=False)
class Call:
    """One operation on parameters and samples.

    Attributes:
        function: The operation.
        uses: What it took that comes from parameters, where it has a rule.
        shape: Its output's.
        edge: Its output's place in the graph.
        deepest: Whether its samples have met no parameter before.
        receive: Called in the backward pass with the gradient of the output.
        hook: By which this happens.
    """

    function: Any
    uses: list[Use]
    shape: torch.Size
    edge: GradientEdge
    deepest: bool
    receive: Callable[[Tensor], object] | None = None
    hook: RemovableHandle | None = None

    @property
    def key(self) -> Key:
        """Equal for the same use of the same parameters in every batch."""
        return (self.function, *(use.names for use in self.uses))

    def forget(self) -> None:
        """Lets go of the graph, which its hook would otherwise keep alive."""
        self.receive = None
        if self.hook is not None:
            self.hook.remove()

    def watch(self, output: Tensor) -> None:
        """Receives the gradient of ``output``, whatever becomes of it in place later."""

        def deliver(grad: Tensor) -> None:
            if self.receive is not None:
                with torch.no_grad():
                    self.receive(grad.reshape(self.shape))

        self.hook = output.register_hook(deliver)


@dataclass
class Recorder(TorchFunctionMode):
    """While in this context, all calls on the ``wanted`` parameters and the samples are recorded.

    Tensors are followed that are computed from parameters and buffers alone, with no sample involved, such as
    a slice of a positional embedding or a weight under a parametrisation. Where such a tensor, or a parameter
    itself, meets samples, the rule of that operation tells its gradients sample by sample.

    Attributes:
        calls: In their order.
        unruled: The names of parameters that met samples where there is no rule.
    """

    module: nn.Module
    wanted: Mapping[str, nn.Parameter]
    calls: list[Call] = field(default_factory=list)
    unruled: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()
        fixed = [*self.module.parameters(), *self.module.buffers()]
        # The tensor itself stands beside its names, so that no other may take its id.
        self._known: dict[int, tuple[Tensor, frozenset[str]]] = {id(x): (x, frozenset()) for x in fixed}
        self._known |= {id(p): (p, frozenset([name])) for name, p in self.wanted.items()}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operation and looks at what it took."""
        kwargs = kwargs or {}
        if func in REWRITES:
            with self:
                rewritten = REWRITES[func](*args, **kwargs)
            if rewritten is not NotImplemented:
                return rewritten
        output = func(*args, **kwargs)
        taken = _taken(args, kwargs)
        origins = [self._known[id(x)][1] for x in taken if id(x) in self._known]
        names = frozenset().union(*origins)
        if (len(origins) == len(taken) and taken and func not in SPREADS) or func is torch.arange:
            self._follow(output, names)
            return output
        for result in tensors_of(output):
            self._known.pop(id(result), None)  # samples were written into it
        if names and torch.is_grad_enabled():
            self._record(func, args, kwargs, output, taken)
        return output

    def _follow(self, output: Any, names: frozenset[str]) -> None:
        for result in tensors_of(output):
            if id(result) not in self._known:
                self._known[id(result)] = (result, names if result.requires_grad else frozenset())

    def _record(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, taken: Sequence[Tensor]
    ) -> None:
        outputs = [result for result in tensors_of(output) if result.requires_grad]
        if not outputs:
            return
        uses = []
        if func in RULES and output is outputs[0]:
            uses = [
                Use(tensor, self._names(tensor), gradients)
                for tensor, gradients in RULES[func](*args, **kwargs)
                if isinstance(tensor, Tensor) and self._names(tensor)
            ]
        ruled = {id(use.tensor) for use in uses}
        self.unruled.update(*(self._names(tensor) for tensor in taken if id(tensor) not in ruled))
        deepest = not any(x.requires_grad for x in taken if id(x) not in self._known)
        for result in outputs:
            whole = self._whole(result)
            call = Call(func, uses, result.shape, get_gradient_edge(whole), deepest)
            call.watch(whole)
            self.calls.append(call)

    def _names(self, tensor: Tensor) -> frozenset[str]:
        return self._known[id(tensor)][1] if id(tensor) in self._known else frozenset()

    def _whole(self, output: Tensor) -> Tensor:
        """What ``output`` is only another shape of: a view loses its hooks when it is changed in place."""
        base = output._base
        if base is None or id(base) in self._known or not base.requires_grad:
            return output
        same = base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous()
        return base if same else output


def _taken(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operation took: most take no containers, and there are many operations."""
    if kwargs or any(isinstance(x, (tuple, list, dict)) for x in args):
        return tensors_of((args, kwargs))
    return [x for x in args if isinstance(x, Tensor)]


def backward(
    total: Tensor, calls: Sequence[Call], leaves: Sequence[Tensor] = (), again: bool = False
) -> list[Tensor | None]:
    """Runs the backward pass of ``total``: calls receive their gradients, those of ``leaves`` are returned.

    Args:
        total: A sum of log-probabilities.
        calls: Those of its forward pass.
        leaves: Parameters.
        again: Whether the same graph will be needed again.
    """
    # Every other call lies on the way to one of these.
    edges: list[Any] = [call.edge for call in calls if call.deepest]
    grads: Sequence[Tensor | None] = ()
    if total.requires_grad and (edges or leaves):
        grads = torch.autograd.grad(total, [*edges, *leaves], retain_graph=again, allow_unused=True)
    if not again:
        for call in calls:
            call.forget()
    own = grads[len(edges) :] if grads else [None] * len(leaves)
    return [grad if grad is None or grad.layout == torch.strided else grad.to_dense() for grad in own]
