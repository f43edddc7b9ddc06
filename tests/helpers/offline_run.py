"""Reads the file that Weights & Biases writes offline: a LevelDB log of protobuf records."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import wandb
from wandb.proto.wandb_internal_pb2 import Record

_FILE_HEADER = 7
_BLOCK = 32 * 1024
_HEADER = 7  # checksum (4 bytes), length (2), type (1)
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[Record]:
    """Yield all records of a ``.wandb`` file."""
    data = path.read_bytes()
    # Blocks are counted from the beginning of the file, with its header.
    at, parts = _FILE_HEADER, []
    while at + _HEADER <= len(data):
        room = _BLOCK - at % _BLOCK
        if room < _HEADER:
            at += room
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts.append(data[at + _HEADER : at + _HEADER + length])
        at += _HEADER + length
        if kind in (_FULL, _LAST):
            yield Record.FromString(b"".join(parts))
            parts = []


class OfflineRun:
    """What the runs of a folder logged, in the order of the runs.

    Attributes:
        history: One dict per row, with the values by the names of the metrics.
        summary: The last value of each metric, by its name.
        axes: The metric that is the x axis of a metric, by the name of the latter or a pattern with a ``*``.
        artifacts: All artifacts that were logged.
    """

    def __init__(self, folder: Path) -> None:
        self.history: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.axes: dict[str, str] = {}
        self.artifacts: list[Any] = []
        # Another process writes the file, and finishing a run does not wait for it.
        wandb.teardown()
        runs = [list(records(path)) for path in folder.rglob("*.wandb")]
        for record in chain.from_iterable(sorted(runs, key=_started)):
            self._take(record)

    def points(self, x: str, y: str) -> list[tuple[float, float]]:
        """Return all points of a chart of y over x."""
        return [(row[x], row[y]) for row in self.history if y in row]

    def _take(self, record: Record) -> None:
        kind = record.WhichOneof("record_type")
        if kind == "history":
            self.history.append(_values(record.history.item))
        elif kind == "summary":
            self.summary |= _values(record.summary.update)
        elif kind == "metric":
            self.axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "artifact":
            self.artifacts.append(record.artifact)


def _started(run: list[Record]) -> int:
    return min(one.run.start_time.ToMicroseconds() for one in run if one.HasField("run"))


def _values(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
