"""Continual learning for PyTorch Lightning by Bit-Level Information Preserving (BLIP)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

# Imported when first asked for: torch and Lightning take seconds, and a command's --help needs neither.
_HOMES = {
    "BLIP": "callback",
    "EnvSequence": "environments",
    "ForgettingCurves": "curves",
    "FrozenBitsOptimizer": "optimizer",
    "Task": "streams",
    "TaskBoundaries": "boundaries",
    "TaskHeads": "heads",
    "TaskSequenceDataModule": "datamodule",
    "TaskStopping": "boundaries",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
