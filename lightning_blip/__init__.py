"""Continual learning for PyTorch Lightning by Bit-Level Information Preserving (BLIP)."""

from lightning_blip.boundaries import TaskBoundaries, TaskStopping
from lightning_blip.callback import BLIP
from lightning_blip.curves import ForgettingCurves
from lightning_blip.datamodule import TaskSequenceDataModule
from lightning_blip.environments import EnvSequence
from lightning_blip.heads import TaskHeads
from lightning_blip.optimizer import FrozenBitsOptimizer
from lightning_blip.streams import Task

__version__ = "0.1.0"

__all__ = [
    "BLIP",
    "EnvSequence",
    "ForgettingCurves",
    "FrozenBitsOptimizer",
    "Task",
    "TaskBoundaries",
    "TaskHeads",
    "TaskSequenceDataModule",
    "TaskStopping",
]
