"""Continual learning for PyTorch Lightning by Bit-Level Information Preserving (BLIP)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_blip.blip import BLIP
    from lightning_blip.optim.optimizer import FrozenBitsOptimizer
    from lightning_blip.results.curves import ForgettingCurves
    from lightning_blip.tasks.boundaries import TaskBoundaries
    from lightning_blip.tasks.datamodule import TaskSequenceDataModule
    from lightning_blip.tasks.environments import EnvSequence
    from lightning_blip.tasks.heads import TaskHeads
    from lightning_blip.tasks.stopping import TaskStopping
    from lightning_blip.tasks.task import Task

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

# Imported when first asked for: torch and Lightning take seconds, and a command's --help needs neither.
_HOMES = {
    "BLIP": "blip",
    "EnvSequence": "tasks.environments",
    "ForgettingCurves": "results.curves",
    "FrozenBitsOptimizer": "optim.optimizer",
    "Task": "tasks.task",
    "TaskBoundaries": "tasks.boundaries",
    "TaskHeads": "tasks.heads",
    "TaskSequenceDataModule": "tasks.datamodule",
    "TaskStopping": "tasks.stopping",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
