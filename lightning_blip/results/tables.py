"""The tables of the report: what the sequences came to, and the settings of the runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lightning_blip import metrics
from lightning_blip.results.record import RunRecord
from lightning_blip.results.scales import MISSING, Unit, number

_MEASURES = {
    "ACC": (metrics.average_score, "mean score over the tasks learned, after the last of them"),
    "BWT": (metrics.backward_transfer, "backward transfer, the mean change since a task was learned"),
    "Forgetting": (metrics.forgetting, "mean fall below the best earlier score of each task"),
}
# The parts of RunRecord.settings, and their titles.
_GROUPS = {
    "blip": "BLIP",
    "chosen": "Chosen from the first task",
    "stream": "Stream",
    "ceilings": "Scores that count as 1",
    "hyperparameters": "Hyperparameters",
    "versions": "Versions",
}


@dataclass(frozen=True)
class Row:
    """A row of a table: its name, what it means, and one value per run."""

    name: str
    meaning: str
    values: list[str]

    @property
    def differs(self) -> bool:
        """Whether the runs have different values."""
        return len(set(self.values)) > 1


def summary(records: Sequence[RunRecord], unit: Unit) -> list[Row]:
    """Return the rows of the table of scores and used capacity.

    Args:
        records: One per run.
        unit: The unit of all scores.
    """
    matrices = [
        torch.tensor(record.matrix, dtype=torch.float64).reshape(len(record.tasks), -1) for record in records
    ]
    return [
        *(
            Row(name, meaning, [unit.full(unit.of_score(float(measure(R)))) for R in matrices])
            for name, (measure, meaning) in _MEASURES.items()
        ),
        Row("Used capacity", "share of all bits that are frozen", list(map(_capacity, records))),
        Row("Tasks learned", "of the tasks in the sequence", list(map(_learned, records))),
    ]


def settings(records: Sequence[RunRecord]) -> list[tuple[str, list[Row]]]:
    """Return the settings of all runs: the title of each group, with its rows.

    Args:
        records: One per run.
    """
    groups = []
    for key, title in _GROUPS.items():
        values = [dict(_flat(record.settings.get(key))) for record in records]
        names = dict.fromkeys(name for of_run in values for name in of_run)
        if names:
            rows = [Row(name, "", [of_run.get(name, MISSING) for of_run in values]) for name in names]
            groups.append((title, rows))
    return groups


def _capacity(record: RunRecord) -> str:
    return f"{number(100 * record.frozen[-1].used_capacity)} %" if record.frozen else MISSING


def _learned(record: RunRecord) -> str:
    return f"{len({score.learning for score in record.scores if score.boundary})} of {len(record.tasks)}"


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield every setting, also those within other settings, by its full name and as text."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _flat(part, f"{name}.{key}" if name else str(key))
    elif name:
        yield name, _text(value)


def _text(value: Any) -> str:
    if isinstance(value, list):
        parts = [_text(part) for part in value]
        return f"{len(parts)} times {parts[0]}" if len(parts) > 1 == len(set(parts)) else ", ".join(parts)
    if isinstance(value, float):
        return f"{value:.6g}"
    return "none" if value is None else str(value)
