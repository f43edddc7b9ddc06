"""One output layer per task, of which one is active."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from typing_extensions import Self


def task_heads(module: nn.Module) -> list[TaskHeads]:
    """All heads per task inside a module.

    Args:
        module: Any.

    Returns:
        In the module's order.

    Example:
        >>> len(task_heads(nn.Sequential(nn.Linear(4, 4), TaskHeads(4, classes=[2, 2]))))
        1
    """
    return [part for part in module.modules() if isinstance(part, TaskHeads)]


class TaskHeads(nn.Module):
    """One Linear head per task; the forward pass goes through the active one.

    In a fit over a sequence of tasks the active head follows the task, and in validation and test that of
    the loader's task. A head that is not active has no gradient, so no optimizer moves it: momentum
    and weight decay included.

    Args:
        in_features: Width of the features.
        classes: How many classes each task has: one head each.
        bias: Whether the heads have a bias.

    Raises:
        ValueError: If there is no task, or one has no class.

    Example:
        >>> import torch
        >>> heads = TaskHeads(16, classes=[2, 3])
        >>> heads.active = 1
        >>> heads(torch.zeros(5, 16)).shape
        torch.Size([5, 3])
    """

    def __init__(self, in_features: int, classes: Sequence[int], bias: bool = True) -> None:
        super().__init__()
        if not classes or min(classes) < 1:
            raise ValueError(
                f"classes={classes} must hold one number for each task, at least 1: classes=[2, 2]"
            )
        self.heads = nn.ModuleList(nn.Linear(in_features, count, bias) for count in classes)
        self._active = 0

    @property
    def active(self) -> int:
        """The index of the task whose head is active."""
        return self._active

    @active.setter
    def active(self, task: int) -> None:
        if not 0 <= task < len(self):
            raise ValueError(f"active={task} is none of the {len(self)} heads, 0 to {len(self) - 1}")
        self._active = task
        self._rest()

    def train(self, mode: bool = True) -> Self:
        """Sets the mode; another head may have become active while evaluating.

        Args:
            mode: Whether to train.

        Returns:
            The module itself.
        """
        super().train(mode)
        self._rest()
        return self

    def __len__(self) -> int:
        return len(self.heads)

    def forward(self, features: Tensor) -> Tensor:
        """The active head's logits.

        Args:
            features: (…, in_features).

        Returns:
            (…, classes of the active task).
        """
        logits: Tensor = self.heads[self._active](features)
        return logits

    def extra_repr(self) -> str:
        """Which head is active."""
        return f"active={self._active}"

    def _rest(self) -> None:
        # Optimizers pass over parameters without a gradient, but not over those with one that is zero. While
        # evaluating, the gradients stay: they may be those of a step that is still being accumulated.
        if self.training:
            for index, head in enumerate(self.heads):
                if index != self._active:
                    head.zero_grad(set_to_none=True)
