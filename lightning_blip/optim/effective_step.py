"""What an optimizer makes of a gradient: how far it moves a parameter along one that stays the same."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def effective_rate(group: dict[str, Any]) -> float:
    """η, the learning rate of a group times what its momentum adds up to, (1 − dampening)/(1 − μ).

    Args:
        group: A parameter group of any optimizer.

    Returns:
        The rate.

    Example:
        >>> import torch
        >>> theta = torch.zeros(2, requires_grad=True)
        >>> group = torch.optim.SGD([theta], lr=0.1, momentum=0.9).param_groups[0]
        >>> round(effective_rate(group), 6)
        1.0
    """
    momentum = float(group.get("momentum", 0.0))
    kept = 1.0 - float(group.get("dampening", 0.0)) if momentum else 1.0
    # A momentum of 1 adds up without end.
    return float(group["lr"]) * kept / max(1.0 - momentum, 1e-3)


def preconditioner(optimizer: Optimizer, theta: Tensor, group: dict[str, Any]) -> Tensor | None:
    """P, what an adaptive optimizer divides the gradient of each value by: √v + ε.

    Args:
        optimizer: Any; of Adam, RMSprop, Adagrad and their kin the running squares v of the gradient are
            known.
        theta: One of its parameters.
        group: The group of the parameter.

    Returns:
        P, of θ's shape; None where gradients are not divided, or nothing is known of it.

    Example:
        >>> import torch
        >>> theta = torch.zeros(2, requires_grad=True)
        >>> optimizer = torch.optim.Adam([theta], lr=0.1)
        >>> theta.grad = torch.tensor([3.0, -0.5])
        >>> _ = optimizer.step()
        >>> preconditioner(optimizer, theta, optimizer.param_groups[0])
        tensor([3.0000, 0.5000])

    Source:
        Kingma and Ba, Adam, ICLR 2015, algorithm 1.
    """
    state = optimizer.state.get(theta, {})
    for name in ("max_exp_avg_sq", "exp_avg_sq", "square_avg", "sum"):
        squares = state.get(name)
        if isinstance(squares, Tensor) and squares.shape == theta.shape:
            beta = group["betas"][1] if "betas" in group else 0.0
            seen = 1.0 - beta ** float(state["step"]) if beta else 1.0
            return (squares / seen).sqrt_().add_(group.get("eps", 0.0))
    return None
