"""The result of one run, in a JSON file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_blip.results.record import write_json


@dataclass(frozen=True)
class Record:
    """The result of one seed of one method on one stream.

    Attributes:
        stream: The name of the stream.
        method: The name of the method.
        settings: The arguments of the method that were given.
        seed: The seed of network, tasks and order of samples.
        tasks: The number of tasks.
        epochs: The number of epochs per task.
        ACC: The average score after the last task, in %.
        BWT: The backward transfer over the T − 1 earlier tasks, in %; None for a single task.
        FWT: The forward transfer, in %; None with a head per task, which is untrained before its task.
        R: R[i][j] is the score on task j after learning task i, in %; None where it was not measured.
        used_capacity: The share of all bits that BLIP has frozen, after each task.
        bytes_per_parameter: The memory that the method keeps from task to task, beside the network.
        seconds: The duration of the fit, its measurements included.
        machine: The processor.
        torch_version: The version of torch.
        ceilings: The score of each task that counts as 100 %; None where that is 1.
        curves: By name of a task, each score during training: the position in tasks, and the score in %.
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
        """Write the file, completely or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Record:
        """Return the record in a file."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))
