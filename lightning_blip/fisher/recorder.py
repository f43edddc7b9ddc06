"""Record the operations of a forward pass that combine parameters with samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lightning_blip.fisher.rewrites import REWRITES
from lightning_blip.fisher.rules import EXPANSIONS, RULES
from lightning_blip.fisher.rules.base import GradientFunction
from lightning_blip.fisher.samples import tensors_in

#: Identifies an operation on the same parameters in every batch.
Key = tuple[Any, ...]


@dataclass
class Use:
    """The use of a parameter, or of a tensor that is computed from parameters, in an operation.

    Attributes:
        tensor: The parameter, or the tensor computed from parameters.
        names: The names of these parameters.
        gradients: Returns the per-sample gradients with respect to ``tensor``, by the operation's rule.
    """

    tensor: Tensor
    names: frozenset[str]
    gradients: GradientFunction


@dataclass(eq=False)
class Call:
    """One operation on parameters and samples.

    Attributes:
        function: The operation.
        uses: The arguments that come from parameters and have a rule.
        shape: The shape of the output.
        edge: The node of the output in autograd's graph.
        is_entry: Whether no earlier call leads to this one, so that the backward pass ends here.
        on_gradient: Called in the backward pass with the gradient of the output.
        hook: The hook on the output that calls ``on_gradient``.
    """

    function: Any
    uses: list[Use]
    shape: torch.Size
    edge: GradientEdge
    is_entry: bool
    on_gradient: Callable[[Tensor], object] | None = None
    hook: RemovableHandle | None = None

    @property
    def key(self) -> Key:
        """The operation and its parameters, which are the same in every batch."""
        return (self.function, *(use.names for use in self.uses))

    def release(self) -> None:
        """Remove the hook, which keeps the graph in memory."""
        self.on_gradient = None
        if self.hook is not None:
            self.hook.remove()

    def watch(self, output: Tensor) -> None:
        """Receive the gradient of ``output``, also if ``output`` is changed in place later."""

        def deliver(grad: Tensor) -> None:
            if self.on_gradient is not None:
                with torch.no_grad():
                    self.on_gradient(grad.reshape(self.shape))

        self.hook = output.register_hook(deliver)


@dataclass
class Recorder(TorchFunctionMode):
    """A context that records all calls on ``wanted`` parameters and samples.

    It follows the tensors that are computed from parameters and buffers only, such as a slice of a positional
    embedding or a weight under a parametrisation. Where such a tensor, or a parameter, is combined with
    samples, the rule of that operation gives its per-sample gradients.

    Args:
        module: The module that is run in this context.
        wanted: The parameters to estimate, by name.

    Attributes:
        calls: The recorded calls, in their order.
        without_rule: The names of parameters that were combined with samples in an operation without a rule.
    """

    module: nn.Module
    wanted: Mapping[str, nn.Parameter]
    calls: list[Call] = field(default_factory=list)
    without_rule: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()
        fixed = [*self.module.parameters(), *self.module.buffers()]
        # Keyed by id; the tensor is kept too, so that its id is not reused.
        self._sample_free: dict[int, tuple[Tensor, frozenset[str]]] = {id(x): (x, frozenset()) for x in fixed}
        self._sample_free |= {id(p): (p, frozenset([name])) for name, p in self.wanted.items()}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, and record or follow its output."""
        kwargs = kwargs or {}
        if func in REWRITES:
            with self:
                rewritten = REWRITES[func](*args, **kwargs)
            if rewritten is not NotImplemented:
                return rewritten
        output = func(*args, **kwargs)
        taken = _taken(args, kwargs)
        origins = [self._sample_free[id(x)][1] for x in taken if id(x) in self._sample_free]
        names = frozenset().union(*origins)
        if (len(origins) == len(taken) and taken and func not in EXPANSIONS) or func is torch.arange:
            self._follow(output, names)
            return output
        for result in tensors_in(output):
            self._sample_free.pop(id(result), None)  # samples may have been written into it in place
        if names and torch.is_grad_enabled():
            self._record(func, args, kwargs, output, taken)
        return output

    def _follow(self, output: Any, names: frozenset[str]) -> None:
        """Remember that ``output`` depends on no sample, and on which parameters it depends."""
        for result in tensors_in(output):
            if id(result) not in self._sample_free:
                self._sample_free[id(result)] = (result, names if result.requires_grad else frozenset())

    def _record(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, taken: Sequence[Tensor]
    ) -> None:
        """Record a call for each output; ``taken`` are the tensors among the arguments."""
        outputs = [result for result in tensors_in(output) if result.requires_grad]
        if not outputs:
            return
        uses = []
        if func in RULES and output is outputs[0]:
            uses = [
                Use(tensor, self._names(tensor), gradients)
                for tensor, gradients in RULES[func](*args, **kwargs)
                if isinstance(tensor, Tensor) and self._names(tensor)
            ]
        with_rule = {id(use.tensor) for use in uses}
        self.without_rule.update(*(self._names(tensor) for tensor in taken if id(tensor) not in with_rule))
        is_entry = not any(x.requires_grad for x in taken if id(x) not in self._sample_free)
        for result in outputs:
            whole = self._whole(result)
            call = Call(func, uses, result.shape, get_gradient_edge(whole), is_entry)
            call.watch(whole)
            self.calls.append(call)

    def _names(self, tensor: Tensor) -> frozenset[str]:
        """Return the names of the parameters that ``tensor`` is, or is computed from, without samples."""
        return self._sample_free[id(tensor)][1] if id(tensor) in self._sample_free else frozenset()

    def _whole(self, output: Tensor) -> Tensor:
        """Return the tensor that ``output`` is a reshaped view of, or ``output``.

        A view loses its hooks when it is changed in place; its base keeps them.
        """
        base = output._base
        if base is None or id(base) in self._sample_free or not base.requires_grad:
            return output
        same = base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous()
        return base if same else output


def _taken(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors among the arguments of an operation."""
    # Most operations have no containers among their arguments, and this runs once per operation.
    if kwargs or any(isinstance(x, (tuple, list, dict)) for x in args):
        return tensors_in((args, kwargs))
    return [x for x in args if isinstance(x, Tensor)]


def backward(
    total: Tensor, calls: Sequence[Call], leaves: Sequence[Tensor] = (), again: bool = False
) -> list[Tensor | None]:
    """Run the backward pass of ``total``: pass their gradients to the calls, return those of ``leaves``.

    Args:
        total: A sum of log-probabilities.
        calls: The calls of its forward pass.
        leaves: Parameters.
        again: Whether the same graph is needed again.

    Returns:
        The gradient of each leaf; None where ``total`` does not depend on it.
    """
    # Every other call is on a path from ``total`` to one of these.
    edges: list[Any] = [call.edge for call in calls if call.is_entry]
    grads: Sequence[Tensor | None] = ()
    if total.requires_grad and (edges or leaves):
        grads = torch.autograd.grad(total, [*edges, *leaves], retain_graph=again, allow_unused=True)
    if not again:
        for call in calls:
            call.release()
    of_leaves = grads[len(edges) :] if grads else [None] * len(leaves)
    return [grad if grad is None or grad.layout == torch.strided else grad.to_dense() for grad in of_leaves]
