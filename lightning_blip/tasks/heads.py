"""One output layer per task, of which one is active at a time."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from typing_extensions import Self


def task_heads(module: nn.Module) -> list[TaskHeads]:
    """Return every :class:`TaskHeads` inside a module.

    Args:
        module: Any module.

    Returns:
        The :class:`TaskHeads`, in the module's order.

    Example:
        >>> len(task_heads(nn.Sequential(nn.Linear(4, 4), TaskHeads(4, classes=[2, 2]))))
        1
    """
    return [part for part in module.modules() if isinstance(part, TaskHeads)]


def shared_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters that all tasks share: those outside :class:`TaskHeads`, by name.

    Args:
        module: The network.

    Returns:
        The parameters, in the module's order.

    Example:
        >>> list(shared_parameters(nn.Sequential(nn.Linear(4, 4, bias=False), TaskHeads(4, classes=[2, 2]))))
        ['0.weight']
    """
    heads = {id(theta) for part in task_heads(module) for theta in part.parameters()}
    return {
        name: theta
        for name, theta in module.named_parameters()
        if theta.requires_grad and id(theta) not in heads
    }


class TaskHeads(nn.Module):
    """One Linear head per task; the forward pass uses the active head.

    In a fit over a sequence of tasks, the active head is that of the current task; in validation and test it
    is that of the loader's task. An inactive head has no gradient, so that no optimizer moves it, not even by
    momentum or weight decay.

    Args:
        in_features: The width of the features.
        classes: The number of classes of each task; there is one head per entry.
        bias: Whether the heads have a bias.

    Raises:
        ValueError: If there is no task, or a task has no class.

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
                f"classes={classes} must hold one number for each task, at least 1, such as classes=[2, 2]"
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
            raise ValueError(
                f"active={task} is none of the {len(self)} heads, 0 to {len(self) - 1}: give TaskHeads one "
                "entry of classes for each task"
            )
        self._active = task
        self._remove_inactive_gradients()

    def train(self, mode: bool = True) -> Self:
        """Set the mode, and remove gradients of heads that became inactive in evaluation.

        Args:
            mode: Whether to train, instead of to evaluate.

        Returns:
            The module itself.
        """
        super().train(mode)
        self._remove_inactive_gradients()
        return self

    def __len__(self) -> int:
        return len(self.heads)

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits of the active head.

        Args:
            features: (…, in_features).

        Returns:
            The logits, (…, classes of the active task).
        """
        logits: Tensor = self.heads[self._active](features)
        return logits

    def extra_repr(self) -> str:
        """Return which head is active, for the module's representation."""
        return f"active={self._active}"

    def _remove_inactive_gradients(self) -> None:
        # Optimizers skip a parameter whose gradient is None, but not one whose gradient is zero. In
        # evaluation the gradients stay, because a training step may still be accumulating them.
        if self.training:
            for index, head in enumerate(self.heads):
                if index != self._active:
                    head.zero_grad(set_to_none=True)
