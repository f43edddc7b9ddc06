"""The charts of runs: what each shows, for the pictures and for the page of the report alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from lightning_blip.results import palette
from lightning_blip.results.chart_types import (
    Bar,
    BarChart,
    Cell,
    HeatMap,
    Label,
    Line,
    LineChart,
    Point,
    short,
)
from lightning_blip.results.palette import Colour
from lightning_blip.results.record import LayerBits, RunRecord, Score
from lightning_blip.results.scales import Axis, Unit, axis_over, number, sequence_axis

# With more tasks, names beside the lines and numbers in the cells of a heat map have no room.
_MOST_NAMED = 12
# With more tasks, numbers in the cells of a heat map have no room for a decimal.
_MOST_DECIMALS = 8
# With more layers, those with the fewest frozen bits share one colour.
_MOST_LAYERS = 8


@dataclass(frozen=True)
class Run:
    """A record of a run, with the name and the colour of the run in charts."""

    name: str
    colour: Colour
    record: RunRecord


@dataclass(frozen=True)
class Scales:
    """The unit and the axes that the charts of several runs share, so that the runs can be compared.

    Attributes:
        unit: The unit of all scores.
        scores: The axis of scores over the sequence.
        heat: The axis of the scores in R.
        capacity: The axis of the used capacity, in %.
    """

    unit: Unit
    scores: Axis
    heat: Axis
    capacity: Axis

    @classmethod
    def of(cls, records: Sequence[RunRecord]) -> Scales:
        """Return the scales that fit all records."""
        unit = Unit.of(records)
        seen = [unit.of_score(score) for record in records for score in record.all_scores]
        R = [unit.of_score(score) for record in records for row in record.matrix for score in row]
        used = [100 * frozen.used_capacity for record in records for frozen in record.frozen]
        return cls(unit, axis_over(seen), axis_over(R), axis_over([0.0, *used]))


def task_scores(record: RunRecord, scales: Scales) -> LineChart:
    """Return the chart of the score on each task, one line per task.

    Args:
        record: What the run measured.
        scales: The scales of all runs that are compared.
    """
    unit, tasks = scales.unit, record.tasks
    lines = [
        Line(
            name,
            palette.task_colour(tasks.index(name), len(tasks)),
            [Point(one.position, unit.of_score(one.score), _tip(one, unit), one.boundary) for one in scores],
        )
        for name, scores in record.scores_by_task.items()
    ]
    return LineChart(
        "Score on each task", sequence_axis(len(tasks)), scales.scores, unit.name(record.metric), tasks,
        *_named(lines, unit),
    )  # fmt: skip


def mean_scores(runs: Sequence[Run], unit: Unit) -> LineChart:
    """Return the chart of the mean score over the tasks seen so far, one line per run.

    Args:
        runs: At least one.
        unit: The unit of all scores.
    """
    name = unit.name(runs[0].record.metric)
    means = [_means(run.record, unit) for run in runs]
    return _one_line_per_run("Mean score over the tasks seen", name, runs, means, unit)


def predicted_forgetting(runs: Sequence[Run]) -> LineChart:
    """Return the chart of the forgetting that BLIP predicted while tasks were trained, one line per run.

    Args:
        runs: The runs in which BLIP predicted forgetting; at least one.
    """
    values = [[(one.position, one.forgetting, False) for one in run.record.predicted] for run in runs]
    return _one_line_per_run("Predicted forgetting", "nats per sample", runs, values, Unit(percent=False))


def score_matrix(record: RunRecord, scales: Scales) -> HeatMap:
    """Return the heat map of R.

    Args:
        record: What the run measured.
        scales: The scales of all runs that are compared.
    """
    unit, tasks = scales.unit, record.tasks
    cells = []
    for learned, row in enumerate(record.matrix):
        for task, score in enumerate(row):
            if math.isfinite(score):
                value = unit.of_score(score)
                fill, ink = palette.heat_colour(scales.heat.at(value) / 100)
                text = unit.text(value, decimals=int(len(tasks) <= _MOST_DECIMALS))
                tip = f"{tasks[task]}: {unit.full(value)} after learning {tasks[learned]}"
                cells.append(Cell(learned, task, fill, ink, text, tip))
    names = [(index, short(name), name) for index, name in enumerate(tasks)]
    return HeatMap(
        "R, the scores after each task", len(tasks), scales.heat, unit.name(record.metric),
        names[:: _every(len(tasks))], cells, numbers=len(tasks) <= _MOST_NAMED,
    )  # fmt: skip


def used_capacity(record: RunRecord, scales: Scales) -> BarChart:
    """Return the chart of the used capacity: the frozen share of all bits after each task, by layer.

    Args:
        record: What a run with BLIP measured.
        scales: The scales of all runs that are compared.
    """
    tasks, last = record.tasks, record.frozen[-1]
    groups = last.grouped(len(last.layers) if len(last.layers) <= _MOST_LAYERS else _MOST_LAYERS - 1)
    ticks = [(index + 0.5, str(index + 1)) for index in range(0, len(tasks), _every(len(tasks)))]
    bars, labels = [], []
    for frozen in record.frozen:
        left, bottom = tasks.index(frozen.task) + 0.15, 0.0
        for index, (name, layers) in enumerate(groups.items()):
            share = 100 * frozen.share_of_bits(layers)
            colour = palette.layer_colour(index, len(groups))
            tip = f"{name}: {number(share)} % of all bits after learning {frozen.task}"
            bars.append(Bar(left, left + 0.7, bottom, bottom + share, colour, tip))
            if frozen is last:
                labels.append(Label(name, f"{number(share, 2)} %", colour, bottom + share / 2))
            bottom += share
    return BarChart(
        "Used capacity by layer", Axis(0.0, float(len(tasks)), ticks), scales.capacity, "tasks learned",
        "% of all bits", bars, labels,
    )  # fmt: skip


def bit_histograms(runs: Sequence[Run]) -> list[tuple[Run, dict[str, BarChart]]]:
    """Return the histograms of the frozen bits after the last task, on the same axes for all layers and runs.

    Args:
        runs: The runs that are compared; those without BLIP are left out.

    Returns:
        Each run, with a histogram per layer, by the name of the layer.
    """
    last = [(run, run.record.frozen[-1].layers) for run in runs if run.record.frozen]
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
    decades = 1 - math.floor(math.log10(least))  # the lowest bar is at least as high as a decade
    every = math.ceil((most + 1) / 8)
    x = Axis(0.0, most + 1.0, [(bits + 0.5, str(bits)) for bits in range(0, most + 1, every)])
    shown = range(0, decades, math.ceil(decades / 4))
    y = Axis(-float(decades), 0.0, [(-float(decade), number(100 * 10.0**-decade)) for decade in shown])
    return [
        (run, {name: _histogram(name, layer, run.colour, x, y) for name, layer in layers.items()})
        for run, layers in last
    ]


def _tip(score: Score, unit: Unit) -> str:
    when = "after" if score.boundary else f"position {number(score.position, 4)}, while"
    return f"{score.task}: {unit.full(unit.of_score(score.score))}, {when} learning {score.learning}"


def _named(lines: Sequence[Line], unit: Unit) -> tuple[list[Line], list[Label]]:
    """Return the lines that can be drawn, and their labels if there is room for them."""
    drawn = [line for line in lines if line.measured]
    ends = [(line, line.measured[-1].y) for line in drawn]
    labels = [Label(line.name, unit.text(y), line.colour, y) for line, y in ends]
    return drawn, labels if len(labels) <= _MOST_NAMED else []


def _one_line_per_run(
    title: str,
    y_name: str,
    runs: Sequence[Run],
    values: Sequence[Sequence[tuple[float, float, bool]]],
    unit: Unit,
) -> LineChart:
    """Return a chart over the longest sequence; values are position, value and whether at a boundary."""
    tasks = max((run.record.tasks for run in runs), key=len)
    lines = [
        Line(
            run.name,
            run.colour,
            [
                Point(at, y, f"{run.name}: {unit.full(y)}, position {number(at, 4)}", boundary)
                for at, y, boundary in of_run
            ],
        )
        for run, of_run in zip(runs, values, strict=True)
    ]
    y = axis_over(point.y for line in lines for point in line.points)
    return LineChart(title, sequence_axis(len(tasks)), y, y_name, tasks, *_named(lines, unit))


def _means(record: RunRecord, unit: Unit) -> list[tuple[float, float, bool]]:
    """Return position, mean over the tasks seen, and whether it is at a boundary, for each validation."""
    seen: dict[tuple[float, int, bool], list[float]] = {}
    for one in record.scores:
        if math.isfinite(one.score):
            seen.setdefault((one.position, one.step, one.boundary), []).append(unit.of_score(one.score))
    return [(position, fmean(scores), boundary) for (position, _, boundary), scores in seen.items()]


def _histogram(name: str, layer: LayerBits, colour: Colour, x: Axis, y: Axis) -> BarChart:
    bars = []
    for bits, count in enumerate(layer.bits):
        if count:
            share = number(100 * count / layer.values)
            tip = f"{bits} bits: {count:,} of {layer.values:,} values ({share} %)"
            top = math.log10(count / layer.values)
            bars.append(Bar(bits + 0.1, bits + 0.9, y.low, top, colour, tip))
    return BarChart(f"Frozen bits of the values of {name}", x, y, "frozen bits", "% of the values", bars, [])


def _every(tasks: int) -> int:
    """Return n, where a tick at every nth task has room for its text."""
    return math.ceil(tasks / _MOST_NAMED)
