"""The results of one method on one stream, as the table shows them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.markdown import spread
from benchmarks.methods import METHODS
from benchmarks.plan import Entry
from benchmarks.record import Record

#: BLIP in its two bases, and the rows that are ceilings instead of methods.
BASES = ("blip", "blip-kronecker")
CEILINGS = ("joint", "single")


@dataclass(frozen=True)
class Row:
    """The results of one method on one stream.

    Attributes:
        method: The name of the method.
        records: One record per seed.
    """

    method: str
    records: list[Record]

    @property
    def title(self) -> str:
        """The method and its settings."""
        settings = "".join(f", {name} = {value:g}" for name, value in self.records[0].settings.items())
        return METHODS[self.method].title + settings

    @property
    def acc(self) -> float:
        """The mean ACC."""
        return statistics.mean(record.ACC for record in self.records)

    @property
    def curves(self) -> dict[str, NDArray[np.float64]]:
        """Positions in tasks and mean scores over the seeds, (2, points), by name of a game."""
        games = self.records[0].curves
        return {name: np.mean([record.curves[name] for record in self.records], axis=0).T for name in games}

    @property
    def matrix(self) -> NDArray[np.float64]:
        """The mean of R over the seeds, without the scores on tasks before they are learned."""
        R = np.mean([np.array(record.R, dtype=float) for record in self.records], axis=0)
        return np.where(np.tri(len(R), dtype=bool), R, np.nan)

    def cells(self) -> list[str]:
        """Return the cells of the row in the table."""

        def figure(of: Callable[[Record], float | None], sign: str = "") -> str:
            values = [value for value in map(of, self.records) if value is not None]
            return spread(values, sign).replace("-", "−") if values else "–"

        return [
            self.title,
            str(len(self.records)),
            figure(lambda record: record.ACC),
            figure(lambda record: record.BWT, "+"),
            figure(lambda record: record.FWT, "+"),
            f"{statistics.mean(record.bytes_per_parameter for record in self.records):.1f}",
            f"{statistics.mean(record.seconds for record in self.records):.0f}",
        ]


def row_of(entry: Entry, folder: Path) -> Row | None:
    """Return the recorded results of a method on a stream.

    Args:
        entry: The method on its stream.
        folder: The folder of the records.

    Returns:
        The results with the best setting of the search; None if there are none yet.
    """
    records = [Record.read(path) for path in paths_of_best(entry, folder) if path.exists()]
    return Row(entry.method, records) if records else None


def paths_of_best(entry: Entry, folder: Path) -> list[Path]:
    """Return the files of the records of all seeds; none before the search has ended."""
    searched = all(job.ended(folder) for job in entry.search)
    return [job.path(folder) for job in entry.seeds_of_best(folder)] if searched else []
