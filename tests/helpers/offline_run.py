"""Reads what Weights & Biases logged offline: a LevelDB log of protobuf records."""

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
    """All records of a ``.wandb`` file."""
    data = path.read_bytes()
    # Blocks are counted from the file's beginning, its header included.
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
    """What was logged by the runs of a folder, in their order.

    Attributes:
        history: A dict for each row, by the name of the metric.
        summary: The last of each.
        axes: The metric on whose axis one is drawn, by name, or by pattern with a ``*``.
        artifacts: Those that were logged.
    """

    def __init__(self, folder: Path) -> None:
        self.history: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.axes: dict[str, str] = {}
        self.artifacts: list[Any] = []
        # To finish a run is not to wait for its file, which another process writes.
        wandb.teardown()
        runs = [list(records(path)) for path in folder.rglob("*.wandb")]
        for record in chain.from_iterable(sorted(runs, key=_started)):
            self._take(record)

    def points(self, x: str, y: str) -> list[tuple[float, float]]:
        """All points of a chart."""
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
