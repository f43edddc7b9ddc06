"""Which parameters the methods look after."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lightning_blip.tasks.heads import task_heads


def tracked(module: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters outside heads per task, by name."""
    heads = {theta for part in task_heads(module) for theta in part.parameters()}
    return {
        name: theta for name, theta in module.named_parameters() if theta.requires_grad and theta not in heads
    }


def beside(parameters: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What was saved, in the order and on the device of the parameters that it belongs to."""
    return {name: saved[name].to(theta.device) for name, theta in parameters.items() if name in saved}
