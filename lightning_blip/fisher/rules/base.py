"""What all rules share: their types, sums of output gradients, and the table of rules by function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from lightning_blip.fisher.gradients import Dense, SampleGradients

#: Puts the samples of a tensor that is laid out like the operation's output into a new dimension 0.
SamplesFirst = Callable[[Tensor], Tensor]
#: Returns per-sample gradients, from the gradient of the operation's output.
GradientFunction = Callable[[Tensor, SamplesFirst], SampleGradients]
#: Has the signature of its operation; yields each argument that may be a parameter and its gradients.
GradientRule = Callable[..., Iterator[tuple[Any, GradientFunction]]]


def summed(parameter: Tensor | Any, factor: Any = 1) -> GradientFunction:
    """Return the output gradients times ``factor``, summed to the shape of ``parameter``.

    Args:
        parameter: A parameter that was broadcast over the output.
        factor: A number, a tensor, or a function that returns one when the gradients are needed.
    """

    def gradients(g: Tensor, samples_first: SamplesFirst) -> SampleGradients:
        values = samples_first(_times(g, factor))
        shape = [1] * (values.ndim - 1 - parameter.ndim) + list(parameter.shape)
        return Dense(values.sum_to_size(len(values), *shape).reshape(len(values), *parameter.shape))

    return gradients


def summed_by_channel(factor: Any = 1) -> GradientFunction:
    """Return the output gradients times ``factor``, summed over all dimensions but samples and channels.

    Args:
        factor: A number, a tensor, or a function that returns one when the gradients are needed.
    """

    def gradients(g: Tensor, samples_first: SamplesFirst) -> SampleGradients:
        return Dense(samples_first(_times(g, factor)).transpose(1, 2).flatten(2).sum(2))

    return gradients


def by_function(rules: Mapping[str, GradientRule], *owners: Any) -> dict[Any, GradientRule]:
    """Return the rules by function; ``rules`` has them by the function's name in the ``owners``."""
    return {
        getattr(owner, name): rule for name, rule in rules.items() for owner in owners if hasattr(owner, name)
    }


def _times(g: Tensor, factor: Any) -> Tensor:
    factor = factor() if callable(factor) and not isinstance(factor, Tensor) else factor
    product: Tensor = g if isinstance(factor, int) and factor == 1 else g * factor
    return product
