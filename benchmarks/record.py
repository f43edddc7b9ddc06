"""The result of one run, kept as a JSON file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_blip.results.record import write_json


@dataclass(frozen=True)
class Record:
    """What one seed of one method came to.

    Attributes:
        stream: Name of the stream.
        method: Name of the method.
        settings: Its arguments that were given.
        seed: Of network, tasks and order of samples.
        tasks: How many there were.
        epochs: How long each was trained.
        ACC: The average score after the last task, in %.
        BWT: The backward transfer over the T − 1 earlier tasks, in %; None of a single task.
        FWT: The forward transfer, in %; None where a task's head is not there before the task.
        R: The score on task j after learning task i, in %, None where not measured.
        used_capacity: Of BLIP, the share of all bits that are frozen, after each task.
        bytes_per_parameter: What is kept from task to task beside the network.
        seconds: How long the fit took, its measurements included.
        machine: Where.
        torch_version: With which torch.
        ceilings: Of each task the score that counts as 100 %, where that is not a score of 1.
        curves: Of each task, where it was scored while the later ones were learned: position in tasks, and %.
    """

    stream: str
    method: str
    settings: dict[str, Any]
    seed: int
    tasks: int
    epochs: int
    ACC: float
    BWT: float | None
    FWT: float | None
    R: list[list[float | None]]
    used_capacity: list[float]
    bytes_per_parameter: float
    seconds: float
    machine: str
    torch_version: str
    ceilings: list[float] | None = None
    curves: dict[str, list[list[float]]] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Saves the record, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Record:
        """A record that was saved."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))
