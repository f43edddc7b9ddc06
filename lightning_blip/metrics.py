"""Metrics of the matrix R: how well the tasks of a sequence were learned, and how well they were kept.

R[i, j] is the score on task j after learning task i; higher is better. Entries that were not measured are
NaN. All metrics describe the state after task t, the last task for which R[t, t] is measured, so they are
defined while the sequence is still being learned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

Over = Literal["previous", "all"]


def average_score(R: Tensor | ArrayLike) -> Tensor:
    """Return the average score over all tasks learned so far, 1/(t+1) Σ_{j≤t} R[t, j].

    Args:
        R: (T, T), NaN where not measured.

    Returns:
        A scalar; NaN if no task was learned yet, or an entry is missing.

    Raises:
        ValueError: If R is not square.

    Example:
        >>> average_score(torch.tensor([[0.9, 0.5], [0.7, 0.8]]))
        tensor(0.7500)

    Source:
        ACC of Lopez-Paz and Ranzato, Gradient Episodic Memory, NeurIPS 2017, equation 2.
    """
    R = _learned(R)
    return R[-1].mean() if len(R) else R.new_tensor(torch.nan)


def backward_transfer(R: Tensor | ArrayLike, over: Over = "previous") -> Tensor:
    """Return how far later tasks changed the scores on earlier tasks, 1/t Σ_{j<t} (R[t, j] − R[j, j]).

    Args:
        R: (T, T), NaN where not measured.
        over: The divisor of the sum: the number of ``"previous"`` tasks, t, or the number of ``"all"`` tasks
            learned, t + 1, as in the paper of BLIP.

    Returns:
        A scalar, negative where tasks were forgotten; NaN with fewer than two tasks or a missing entry.

    Raises:
        ValueError: If R is not square, or ``over`` is neither ``"previous"`` nor ``"all"``.

    Example:
        >>> R = torch.tensor([[0.9, 0.5], [0.7, 0.8]])
        >>> backward_transfer(R), backward_transfer(R, over="all")
        (tensor(-0.2000), tensor(-0.1000))

    Source:
        BWT of Lopez-Paz and Ranzato, NeurIPS 2017, equation 3; divided by T in Shi et al., CVPR 2021,
        section 4.
    """
    if over not in ("previous", "all"):
        raise ValueError(f"over={over!r} must be 'previous' or 'all'")
    R = _learned(R)
    if len(R) < 2:
        return R.new_tensor(torch.nan)
    return (R[-1] - R.diagonal())[:-1].sum() / (len(R) - (over == "previous"))


def forgetting(R: Tensor | ArrayLike) -> Tensor:
    """Return how far scores fell below their earlier best, 1/t Σ_{j<t} (max_{l<t} R[l, j] − R[t, j]).

    Args:
        R: (T, T), NaN where not measured. Scores on tasks that were not learned yet count if they were
            measured.

    Returns:
        A scalar, positive where tasks were forgotten; NaN with fewer than two tasks or a missing entry.

    Raises:
        ValueError: If R is not square.

    Example:
        >>> forgetting(torch.tensor([[0.9, 0.5], [0.7, 0.8]]))
        tensor(0.2000)

    Source:
        F_k of Chaudhry et al., Riemannian Walk, ECCV 2018, section 3.2.
    """
    R = _learned(R)
    if len(R) < 2:
        return R.new_tensor(torch.nan)
    past = R[:-1, :-1]
    # A missing score on a task that was not learned yet is left out; any other might be the best score.
    unlearned = torch.ones_like(past, dtype=torch.bool).triu(diagonal=1)
    best = past.masked_fill(unlearned & past.isnan(), -torch.inf).amax(dim=0)
    return (best - R[-1, :-1]).mean()


def forward_transfer(R: Tensor | ArrayLike, baseline: Tensor | ArrayLike) -> Tensor:
    """Return how far earlier tasks helped with tasks not learned yet, 1/t Σ_{1≤j≤t} (R[j−1, j] − b_j).

    Args:
        R: (T, T), NaN where not measured; the score on each task just before it is learned must be there.
        baseline: (T,), b_j, the scores of the network at its random initialisation, measured before any
            training.

    Returns:
        A scalar; NaN with fewer than two tasks or a missing entry.

    Raises:
        ValueError: If R is not square, or ``baseline`` has another length.

    Example:
        >>> forward_transfer(torch.tensor([[0.9, 0.6], [0.7, 0.8]]), baseline=torch.tensor([0.5, 0.5]))
        tensor(0.1000)

    Source:
        FWT of Lopez-Paz and Ranzato, NeurIPS 2017, equation 4.
    """
    R, baseline = _square(R), torch.as_tensor(baseline)
    if baseline.shape != R.shape[:1]:
        raise ValueError(
            f"baseline of shape {tuple(baseline.shape)} must hold one score for each of the {len(R)} tasks"
        )
    R = _learned(R)
    if len(R) < 2:
        return R.new_tensor(torch.nan)
    return (R.diagonal(offset=1) - baseline[1 : len(R)].to(R)).mean()


def _square(R: Tensor | ArrayLike) -> Tensor:
    """Return R as a square matrix of floating-point numbers of at least the default precision."""
    R = torch.as_tensor(R)
    if R.ndim != 2 or R.shape[0] != R.shape[1]:
        raise ValueError(f"R of shape {tuple(R.shape)} must be square: one row and one column per task")
    return R.to(torch.promote_types(R.dtype, torch.get_default_dtype()))


def _learned(R: Tensor | ArrayLike) -> Tensor:
    """Return the part of R that belongs to the tasks learned so far."""
    R = _square(R)
    measured = R.diagonal().isfinite().nonzero()
    tasks = int(measured[-1]) + 1 if len(measured) else 0
    return R[:tasks, :tasks]


def _mean_of_measured(matrices: Tensor) -> Tensor:
    """Reduce (processes, T, T) to (T, T): the mean of each entry over the processes that measured it."""
    return matrices.nanmean(dim=0)


class _MatrixMetric(Metric):
    """A metric that collects the entries of R, which are part of the module's checkpoint."""

    # Otherwise forward() merges states by dist_reduce_fx, which takes the mean of scores on the same task.
    full_state_update = True
    is_differentiable = False
    higher_is_better = True
    matrix: Tensor

    def __init__(self, tasks: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if tasks < 1:
            raise ValueError(f"tasks={tasks} must be at least 1")
        unmeasured = torch.full((tasks, tasks), torch.nan)
        self.add_state("matrix", unmeasured, dist_reduce_fx=_mean_of_measured, persistent=True)

    def update(self, learned: int, task: int, score: float | Tensor) -> None:
        """Set an entry of R; a task that is scored again gets its new score.

        Args:
            learned: i, the index of the task that was learned last.
            task: j, the index of the task that was scored.
            score: R[i, j].

        Raises:
            ValueError: If there is no task with one of the indices.
        """
        tasks = len(self.matrix)
        if not (0 <= learned < tasks and 0 <= task < tasks):
            raise ValueError(
                f"learned={learned} and task={task} must be indices of the {tasks} tasks, 0 to {tasks - 1}"
            )
        self.matrix[learned, task] = torch.as_tensor(score)


class AverageScore(_MatrixMetric):
    """:func:`average_score` as a metric.

    Args:
        tasks: T, the number of tasks in the sequence.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = AverageScore(tasks=2)
        >>> metric.update(learned=0, task=0, score=0.9)
        >>> metric.compute()
        tensor(0.9000)
    """

    def compute(self) -> Tensor:
        """Return the average score."""
        return average_score(self.matrix)


class BackwardTransfer(_MatrixMetric):
    """:func:`backward_transfer` as a metric.

    Args:
        tasks: T, the number of tasks in the sequence.
        over: ``"previous"`` or ``"all"``.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = BackwardTransfer(tasks=2)
        >>> for learned, task, score in [(0, 0, 0.9), (1, 0, 0.7), (1, 1, 0.8)]:
        ...     metric.update(learned, task, score)
        >>> metric.compute()
        tensor(-0.2000)
    """

    def __init__(self, tasks: int, over: Over = "previous", **kwargs: Any) -> None:
        super().__init__(tasks, **kwargs)
        # A wrong argument is refused here, before the tasks are learned.
        backward_transfer(self.matrix, over)
        self.over: Over = over

    def compute(self) -> Tensor:
        """Return the backward transfer."""
        return backward_transfer(self.matrix, self.over)


class Forgetting(_MatrixMetric):
    """:func:`forgetting` as a metric.

    Args:
        tasks: T, the number of tasks in the sequence.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = Forgetting(tasks=2)
        >>> for learned, task, score in [(0, 0, 0.9), (1, 0, 0.7), (1, 1, 0.8)]:
        ...     metric.update(learned, task, score)
        >>> metric.compute()
        tensor(0.2000)
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """Return the forgetting."""
        return forgetting(self.matrix)


class ForwardTransfer(_MatrixMetric):
    """:func:`forward_transfer` as a metric.

    Args:
        tasks: T, the number of tasks in the sequence.
        baseline: (T,), the scores of the network at its random initialisation, measured before any training.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = ForwardTransfer(tasks=2, baseline=torch.tensor([0.5, 0.5]))
        >>> for learned, task, score in [(0, 0, 0.9), (0, 1, 0.6), (1, 1, 0.8)]:
        ...     metric.update(learned, task, score)
        >>> metric.compute()
        tensor(0.1000)
    """

    def __init__(self, tasks: int, baseline: Tensor | ArrayLike, **kwargs: Any) -> None:
        super().__init__(tasks, **kwargs)
        # A wrong argument is refused here, before the tasks are learned.
        forward_transfer(self.matrix, baseline)
        self.baseline = baseline

    def compute(self) -> Tensor:
        """Return the forward transfer."""
        return forward_transfer(self.matrix, self.baseline)
