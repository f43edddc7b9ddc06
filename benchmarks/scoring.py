"""The accuracy on a task, outside of the validation loop."""

from __future__ import annotations

import torch

from benchmarks.networks import Classifier
from lightning_blip import TaskHeads
from lightning_blip.fisher.isolation import left_as_before
from lightning_blip.tasks.task import MappedDataset, Task

_BATCH_SIZE = 2_000


def accuracy(module: Classifier, task: Task) -> float:
    """Return the share of a task's validation samples that a network classifies correctly.

    Args:
        module: The network; with heads per task, that of the task is used. Its state stays as it was.
        task: The task, its samples held in memory.

    Returns:
        The accuracy, 0 to 1.
    """
    samples, head = task.val, module.head
    assert isinstance(samples, MappedDataset)
    layer = head.heads[task.index] if isinstance(head, TaskHeads) else head
    right = 0
    with left_as_before(module, module.device, wanted=()):
        for indices in torch.arange(len(samples)).split(_BATCH_SIZE):
            x, y = (part.to(module.device) for part in samples.batch(indices))
            right += int((layer(module.body(x)).argmax(1) == y).sum())
    return right / len(samples)
