"""The slow reference: one backward pass per sample, gradients squared and averaged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_blip.fisher.samples import call_arguments


def categorical(output: Any, target: Tensor) -> Tensor:
    output = getattr(output, "logits", output)
    if output.ndim > 2 and output[:, 0].shape != target.shape:
        output = output.movedim(-1, 1)
    return -F.cross_entropy(output, target, reduction="sum", ignore_index=-100)


def gaussian(output: Tensor, target: Tensor) -> Tensor:
    return torch.distributions.Normal(output, 1.0).log_prob(target).sum()


def bernoulli(output: Tensor, target: Tensor) -> Tensor:
    return torch.distributions.Bernoulli(logits=output).log_prob(target).sum()


def slow_fisher(
    module: nn.Module,
    inputs: Any,
    targets: Tensor,
    log_prob: Callable[[Any, Tensor], Tensor] = categorical,
) -> dict[str, Tensor]:
    """Return the empirical diagonal Fisher information of ``module`` in evaluation mode."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for i in range(len(targets)):
        args, kwargs = call_arguments(_part(inputs, slice(i, i + 1)))
        output = module(*args, **kwargs)
        total = log_prob(output, targets[i : i + 1])
        grads = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        for name, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                sums[name] += grad**2
    for part, mode in modes.items():
        part.training = mode
    return {name: total / len(targets) for name, total in sums.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-8) -> None:
    """Compare element by element, with a tolerance relative to each element.

    Differences are rounding errors if they are tiny beside the tensor's largest element, or beside the square
    of such an error in the network's largest element, which is what remains where gradients cancel.
    """
    assert found.keys() == expected.keys()
    largest = max(float(value.max()) for value in expected.values())
    for name, value in expected.items():
        atol = max(rtol * 1e-4 * float(value.max()), 1e-28 * largest)
        torch.testing.assert_close(
            found[name], value, rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )


def in_batches(inputs: Any, targets: Any, size: int) -> list[tuple[Any, Any]]:
    parts = [slice(start, start + size) for start in range(0, len(targets), size)]
    return [(_part(inputs, part), targets[part]) for part in parts]


def _part(inputs: Any, samples: slice) -> Any:
    if isinstance(inputs, Tensor):
        return inputs[samples]
    if isinstance(inputs, dict):
        return {name: tensor[samples] for name, tensor in inputs.items()}
    return tuple(tensor[samples] for tensor in inputs)
