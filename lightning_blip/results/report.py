"""The report: one page that shows what a run learned, kept and froze, or several runs side by side."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from jinja2 import Environment, StrictUndefined
from rich.cells import cell_len, set_cell_size
from torch import Tensor

from lightning_blip import metrics
from lightning_blip.results import charts
from lightning_blip.results.charts import MISSING, Axis, Bar, Cell, Label, Line, number, with_minus
from lightning_blip.results.record import RECORD, Frozen, LayerBits, RunRecord, Score

# More tasks than this, and neither names beside the curves nor numbers in the heat map can be read.
_MOST_NAMED = 12
# More tasks than this, and numbers in the heat map have no room for a decimal.
_MOST_DECIMALS = 8
# So many cells of text of a longer name are shown at either end.
_HALF_A_NAME = 7
# So many layers have a colour of their own; those with the fewest frozen bits share one.
_MOST_LAYERS = 8
_GROUPS = {
    "blip": "BLIP",
    "chosen": "Chosen from the first task",
    "stream": "Stream",
    "ceilings": "Scores that count as 1",
    "hyperparameters": "Hyperparameters",
    "versions": "Versions",
}


@dataclass(frozen=True)
class _Run:
    """A record, and what tells it from the others."""

    name: str
    colour: charts.Colour
    record: RunRecord

    @property
    def means(self) -> list[tuple[float, float, bool]]:
        """Position, mean over the tasks seen and whether it is a boundary's, of each validation."""
        seen: dict[tuple[float, int, bool], list[float]] = {}
        for score in self.record.scores:
            if math.isfinite(score.score):
                seen.setdefault((score.position, score.step, score.boundary), []).append(score.score)
        return [(position, fmean(scores), boundary) for (position, _, boundary), scores in seen.items()]

    @property
    def last(self) -> Frozen | None:
        """What was frozen in the end."""
        return self.record.frozen[-1] if self.record.frozen else None


@dataclass(frozen=True)
class _Scale:
    """How scores are shown: in % where all lie within 0 to 1."""

    percent: bool

    def __call__(self, score: float) -> float:
        return 100 * score if self.percent else score

    def text(self, score: float, decimals: int = 1) -> str:
        """A score as it stands in cells and beside curves."""
        if not self.percent or not math.isfinite(score):
            return number(score, 2 + decimals)
        return with_minus(f"{round(100 * score, decimals) + 0.0:.{decimals}f}")  # no minus before 0

    def full(self, score: float) -> str:
        """A score with its unit."""
        return self.text(score) + (" %" if self.percent and math.isfinite(score) else "")


@dataclass(frozen=True)
class _Lines:
    """Lines over positions, with names at the right, or a strip of colours where there are too many."""

    title: str
    x: Axis
    y: Axis
    unit: str
    tasks: list[str]
    lines: list[Line]
    labels: list[Label]


@dataclass(frozen=True)
class _Map:
    """R as a heat map: names on both axes, each where it lies, in %."""

    title: str
    size: float
    names: list[tuple[float, str, str]]
    cells: list[Cell]
    numbers: bool
    longest: int


@dataclass(frozen=True)
class _Stack:
    """The share of all bits that are frozen after each task, by layer."""

    title: str
    x: Axis
    y: Axis
    bars: list[Bar]
    labels: list[Label]


@dataclass(frozen=True)
class _Histogram:
    """How many of a layer's values have how many frozen bits."""

    layer: str
    title: str
    x: Axis
    y: Axis
    bars: list[Bar]


@dataclass(frozen=True)
class _Row:
    """A row of a table: a value of each run."""

    name: str
    meaning: str
    values: list[str]

    @property
    def differs(self) -> bool:
        """Whether runs have different values."""
        return len(set(self.values)) > 1


def report(runs: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Makes one page that shows a run, or several side by side: scores, curves, R, capacity and settings.

    The page is a single file that needs no network. It shows what :class:`ForgettingCurves` recorded.

    Args:
        runs: Folders in which a ``forgetting.json`` lies, or below which: then the newest of them is taken.
            Or such files.
        output: Where the page goes. By default ``report.html`` in the folder of the record, or in the one
            that all records have in common.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: If there is no record in one of the folders.
        ValueError: If no run is given, a record cannot be read, or runs were scored by different metrics.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> record = RunRecord("val_acc", ["first"], [[0.5]], [], [], [], {})
        >>> with TemporaryDirectory() as folder:
        ...     record.write(Path(folder) / "forgetting.json")
        ...     print(report([folder]).name)
        report.html
    """
    paths = list(dict.fromkeys(_find(Path(run)).resolve() for run in runs))
    if not paths:
        raise ValueError("runs=[] must name at least one folder with a forgetting.json")
    records = [RunRecord.read(path) for path in paths]
    measured = list(dict.fromkeys(record.metric for record in records))
    if len(measured) > 1:
        raise ValueError(
            f"runs were scored by different metrics, {measured}: compare runs of the same metric"
        )
    named = [
        _Run(name, charts.run_colour(index), record)
        for index, (name, record) in enumerate(zip(_names(paths), records, strict=True))
    ]
    page = Path(output or Path(os.path.commonpath([path.parent for path in paths])) / "report.html")
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(_page(named), encoding="utf-8")
    return page


def _find(run: Path) -> Path:
    if run.is_file():
        return run
    if (run / RECORD).is_file():
        return run / RECORD
    below = sorted(run.rglob(RECORD), key=lambda path: path.stat().st_mtime)
    if not below:
        raise FileNotFoundError(
            f"there is no {RECORD} in or below runs={str(run)!r}: a fit with the callback ForgettingCurves "
            "writes one into its log folder"
        )
    return below[-1]


def _names(paths: Sequence[Path]) -> list[str]:
    """As much of the folders' paths, from their ends, as tells them apart."""
    for parts in range(1, 1 + max(len(path.parts) for path in paths)):
        names = ["/".join(path.parent.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _page(runs: Sequence[_Run]) -> str:
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    scores = [score for run in runs for score in _all_scores(run.record)]
    scale = _Scale(percent=all(0 <= score <= 1 for score in scores if math.isfinite(score)))
    y = charts.axis(map(scale, scores))
    heat = charts.axis(scale(score) for run in runs for row in run.record.matrix for score in row)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(template).render(
        runs=runs,
        tasks=list(dict.fromkeys(len(run.record.tasks) for run in runs)),
        metric=runs[0].record.metric,
        percent=scale.percent,
        height=charts.HEIGHT,
        scores=_metrics(runs, scale),
        curves=[_curves(run, scale, y) for run in runs],
        means=_means(runs, scale) if len(runs) > 1 else None,
        maps=[_map(run, scale, heat) for run in runs],
        heat=heat,
        heat_colours=[charts.heat_colour(step / 20)[0] for step in range(21)],
        stacks=_stacks(runs),
        histograms=_histograms(runs),
        predicted=_predicted(runs),
        settings=_settings(runs),
    )


def _all_scores(record: RunRecord) -> Iterator[float]:
    yield from (score.score for score in record.scores)
    yield from (score for row in record.matrix for score in row)


def _metrics(runs: Sequence[_Run], scale: _Scale) -> list[_Row]:
    """The table of what a sequence came to."""
    measures = {
        "ACC": (metrics.average_score, "mean score over the tasks learned, after the last of them"),
        "BWT": (metrics.backward_transfer, "backward transfer, the mean change since a task was learned"),
        "Forgetting": (metrics.forgetting, "mean fall below the best score that each task ever had"),
    }  # fmt: skip
    rows = [
        _Row(name, meaning, [scale.full(float(measure(_matrix(run.record)))) for run in runs])
        for name, (measure, meaning) in measures.items()
    ]
    capacity = [MISSING if run.last is None else f"{number(100 * run.last.used_capacity)} %" for run in runs]
    learned = [
        f"{len({score.learning for score in run.record.scores if score.boundary})} of {len(run.record.tasks)}"
        for run in runs
    ]
    return [
        *rows,
        _Row("Used capacity", "share of all bits that are frozen", capacity),
        _Row("Tasks learned", "of those in the sequence", learned),
    ]


def _matrix(record: RunRecord) -> Tensor:
    return torch.tensor(record.matrix, dtype=torch.float64).reshape(len(record.tasks), len(record.tasks))


def _curves(run: _Run, scale: _Scale, y: Axis) -> _Lines:
    """The score on each task of a run."""
    tasks = run.record.tasks
    x = charts.positions(len(tasks))
    lines = []
    for index, name in enumerate(tasks):
        points = [
            (score.position, scale(score.score), _tip(name, scale.full(score.score), score), score.boundary)
            for score in run.record.scores
            if score.task == name
        ]
        lines.append(charts.line(name, charts.task_colour(index, len(tasks)), x, y, points))
    final = {score.task: scale.text(score.score) for score in run.record.scores if math.isfinite(score.score)}
    named = [(line.name, final[line.name], line.colour, line.marks[-1].y) for line in lines if line.marks]
    return _Lines(
        title=f"Score on each task over the sequence: {run.name}",
        x=x, y=y, unit=_unit(run.record.metric, scale), tasks=tasks, lines=lines,
        labels=charts.labels(named) if len(named) <= _MOST_NAMED else [],
    )  # fmt: skip


def _tip(name: str, value: str, score: Score) -> str:
    when = "after" if score.boundary else f"position {number(score.position, 4)}, while"
    return f"{name}: {value}, {when} learning {score.learning}"


def _unit(metric: str, scale: _Scale) -> str:
    return f"{metric} in %" if scale.percent else metric


def _overlay(
    title: str,
    unit: str,
    runs: Sequence[_Run],
    values: Sequence[Sequence[tuple[float, float, bool]]],
    scale: _Scale,
) -> _Lines:
    """A line for each run, of position, value and whether it is a boundary's, over the longest sequence."""
    tasks = max((run.record.tasks for run in runs), key=len)
    x = charts.positions(len(tasks))
    y = charts.axis(scale(value) for of_run in values for _, value, _ in of_run)
    lines = []
    for run, of_run in zip(runs, values, strict=True):
        points = [
            (at, scale(value), f"{run.name}: {scale.full(value)}, position {number(at, 4)}", boundary)
            for at, value, boundary in of_run
        ]
        lines.append(charts.line(run.name, run.colour, x, y, points))
    named = [
        (line.name, scale.text(of_run[-1][1]), line.colour, line.marks[-1].y)
        for line, of_run in zip(lines, values, strict=True)
        if line.marks
    ]
    return _Lines(title, x, y, unit, tasks, lines, charts.labels(named))


def _means(runs: Sequence[_Run], scale: _Scale) -> _Lines:
    """The mean score over the tasks seen, a line for each run."""
    unit = _unit(runs[0].record.metric, scale)
    return _overlay("Mean score over the tasks seen so far", unit, runs, [run.means for run in runs], scale)


def _predicted(runs: Sequence[_Run]) -> _Lines | None:
    """The forgetting that BLIP predicted while tasks were trained."""
    runs = [run for run in runs if run.record.predicted]
    if not runs:
        return None
    values = [[(one.position, one.forgetting, False) for one in run.record.predicted] for run in runs]
    title = "Predicted forgetting over the sequence"
    return _overlay(title, "nats a sample", runs, values, _Scale(percent=False))


def _map(run: _Run, scale: _Scale, heat: Axis) -> _Map:
    """R of a run."""
    tasks = run.record.tasks
    size = 100 / len(tasks)
    every = math.ceil(len(tasks) / _MOST_NAMED)
    cells = []
    for learned, row in enumerate(run.record.matrix):
        for task, score in enumerate(row):
            if math.isfinite(score):
                fill, ink = charts.heat_colour(heat.at(scale(score)) / 100)
                text = scale.text(score, decimals=int(len(tasks) <= _MOST_DECIMALS))
                tip = f"{tasks[task]}: {scale.full(score)} after learning {tasks[learned]}"
                cells.append(Cell(task * size, learned * size, fill, ink, text, tip))
    named = [((index + 0.5) * size, _short(name), name) for index, name in enumerate(tasks)][::every]
    return _Map(
        title=f"R, score on each task (columns) after learning each task (rows): {run.name}",
        size=size, names=named, cells=cells, numbers=len(tasks) <= _MOST_NAMED,
        longest=max((len(cell.text) for cell in cells), default=1),
    )  # fmt: skip


def _short(name: str) -> str:
    """A name that fits on an axis: names often differ at their ends only."""
    if cell_len(name) <= 2 * _HALF_A_NAME:
        return name
    start, end = set_cell_size(name, _HALF_A_NAME), set_cell_size(name[::-1], _HALF_A_NAME - 1)[::-1]
    return f"{start.rstrip()}…{end.lstrip()}"


def _stacks(runs: Sequence[_Run]) -> list[tuple[_Run, _Stack]]:
    """The frozen share of all bits after each task, by layer, of the runs with BLIP."""
    runs = [run for run in runs if run.record.frozen]
    y = charts.axis([0.0, *(100 * frozen.used_capacity for run in runs for frozen in run.record.frozen)])
    return [(run, _stack(run, y)) for run in runs]


def _stack(run: _Run, y: Axis) -> _Stack:
    tasks, frozen = run.record.tasks, run.record.frozen
    count = len(frozen[-1].layers)
    layers = frozen[-1].grouped(count if count <= _MOST_LAYERS else _MOST_LAYERS - 1)
    every = math.ceil(len(tasks) / _MOST_NAMED)
    ticks = [(index + 0.5, str(index + 1)) for index in range(0, len(tasks), every)]
    x = Axis.of(0.0, float(len(tasks)), ticks)
    bars, named = [], []
    for after in frozen:
        place, height = tasks.index(after.task), 0.0
        for index, (name, members) in enumerate(layers.items()):
            share = 100 * after.share_of_bits(members)
            colour = charts.layer_colour(index, len(layers))
            tip = f"{name}: {number(share)} % of all bits after learning {after.task}"
            bars.append(
                Bar(x.at(place + 0.15), 100 - y.at(height + share), x.at(0.7), y.at(share), colour, tip)
            )
            if after is frozen[-1]:
                named.append((name, f"{number(share, 2)} %", colour, 100 - y.at(height + share / 2)))
            height += share
    return _Stack(
        f"Frozen share of all bits after each task, by layer: {run.name}", x, y, bars, charts.labels(named)
    )


def _histograms(runs: Sequence[_Run]) -> list[tuple[_Run, list[_Histogram]]]:
    """The bits of each layer after the last task, of the runs with BLIP, on the same axes."""
    last = [(run, run.last.layers) for run in runs if run.last is not None]
    shares = [
        (bits, count / layer.values)
        for _, layers in last
        for layer in layers.values()
        for bits, count in enumerate(layer.bits)
        if count
    ]
    if not shares:
        return []
    most, least = max(bits for bits, _ in shares), min(share for _, share in shares)
    decades = 1 - math.floor(math.log10(least))  # the least bar is at least as high as a decade
    every = math.ceil((most + 1) / 8)
    x = Axis.of(0.0, most + 1.0, [(bits + 0.5, str(bits)) for bits in range(0, most + 1, every)])
    shown = range(0, decades, math.ceil(decades / 4))
    y = Axis.of(-float(decades), 0.0, [(-decade, number(100 * 10.0**-decade)) for decade in shown])
    return [(run, [_histogram(run, *layer, x, y) for layer in layers.items()]) for run, layers in last]


def _histogram(run: _Run, name: str, layer: LayerBits, x: Axis, y: Axis) -> _Histogram:
    bars = []
    for bits, count in enumerate(layer.bits):
        if count:
            height = y.at(math.log10(count / layer.values))
            tip = (
                f"{bits} bits: {count:,} of {layer.values:,} values ({number(100 * count / layer.values)} %)"
            )
            bars.append(Bar(x.at(bits + 0.1), 100 - height, x.at(0.8), height, run.colour, tip))
    return _Histogram(name, f"Frozen bits of the values of {name}: {run.name}", x, y, bars)


def _settings(runs: Sequence[_Run]) -> list[tuple[str, list[_Row]]]:
    """The settings of all runs, group by group."""
    groups = []
    for key, title in _GROUPS.items():
        values = [dict(_flat(run.record.settings.get(key))) for run in runs]
        names = dict.fromkeys(name for of_run in values for name in of_run)
        rows = [_Row(name, "", [of_run.get(name, MISSING) for of_run in values]) for name in names]
        groups.append((title, rows))
    return [(title, rows) for title, rows in groups if rows]


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Settings within settings, each with its full name and as text."""
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
