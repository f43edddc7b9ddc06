"""The effective step size of an optimizer: how far it moves a parameter along a constant gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def effective_rate(group: dict[str, Any]) -> float:
    """Return η, the learning rate times the sum of the momentum's weights, (1 − dampening)/(1 − μ).

    Args:
        group: A parameter group of any optimizer; a missing momentum μ counts as 0.

    Returns:
        η.

    Example:
        >>> import torch
        >>> theta = torch.zeros(2, requires_grad=True)
        >>> group = torch.optim.SGD([theta], lr=0.1, momentum=0.9).param_groups[0]
        >>> round(effective_rate(group), 6)
        1.0
    """
    momentum = float(group.get("momentum", 0.0))
    kept = 1.0 - float(group.get("dampening", 0.0)) if momentum else 1.0
    # With μ = 1 the sum would be infinite.
    return float(group["lr"]) * kept / max(1.0 - momentum, 1e-3)


def preconditioner(optimizer: Optimizer, theta: Tensor, group: dict[str, Any]) -> Tensor | None:
    """Return P = √v + ε, by which an adaptive optimizer divides the gradient of each value.

    Args:
        optimizer: Any optimizer; v, the mean or sum of the squared gradients, is read from the state of Adam,
            RMSprop, Adagrad and their variants.
        theta: A parameter of the optimizer.
        group: The parameter group that θ belongs to.

    Returns:
        P, of θ's shape; None if the optimizer has no v, as SGD, or none yet.

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
