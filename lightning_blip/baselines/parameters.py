"""The parameters that the methods protect."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lightning_blip.tasks.heads import task_heads


def tracked(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters outside ``TaskHeads``, by name.

    Args:
        module: The network.

    Returns:
        The parameters, in the module's order.

    Example:
        >>> from lightning_blip import TaskHeads
        >>> list(tracked(nn.Sequential(nn.Linear(4, 4, bias=False), TaskHeads(4, classes=[2, 2]))))
        ['0.weight']
    """
    heads = {theta for part in task_heads(module) for theta in part.parameters()}
    return {
        name: theta for name, theta in module.named_parameters() if theta.requires_grad and theta not in heads
    }


def beside(parameters: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return saved values in the order and on the device of the parameters that they belong to."""
    return {name: saved[name].to(theta.device) for name, theta in parameters.items() if name in saved}
