"""Draws the charts of runs as pictures with matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_blip.results import charts, palette
from lightning_blip.results.chart_types import BarChart, HeatMap, Label, LineChart, short
from lightning_blip.results.charts import Run, Scales
from lightning_blip.results.record import RunRecord
from lightning_blip.results.scales import Axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def overview(record: RunRecord) -> Figure:
    """Return a picture of the scores over the sequence, with R beside them.

    Args:
        record: A record with at least one score.
    """
    figure, scales = _figure(13, 4.8), Scales.of([record])
    curves, matrix = figure.subplots(1, 2, width_ratios=[3, 2])
    _draw_lines(curves, charts.task_scores(record, scales))
    _draw_heat_maps([matrix], [charts.score_matrix(record, scales)])
    return figure


def curves_picture(record: RunRecord) -> Figure:
    """Return a picture of the score on each task over the sequence.

    Args:
        record: A record with at least one score.
    """
    figure = _figure(8, 4.8)
    _draw_lines(figure.subplots(), charts.task_scores(record, Scales.of([record])))
    return figure


def matrix_picture(record: RunRecord) -> Figure:
    """Return a picture of R as a heat map.

    Args:
        record: A record with at least one score.
    """
    figure = _figure(6, 4.8)
    _draw_heat_maps([figure.subplots()], [charts.score_matrix(record, Scales.of([record]))])
    return figure


def capacity_picture(record: RunRecord) -> Figure:
    """Return a picture of the share of all bits that each layer has frozen after each task.

    Args:
        record: The record of a run with BLIP.
    """
    figure = _figure(8, 4.8)
    _draw_bars(figure.subplots(), charts.used_capacity(record, Scales.of([record])))
    return figure


def comparison(records: Mapping[str, RunRecord]) -> Figure:
    """Return a picture of the mean scores of several runs, with R of each run beside them.

    Args:
        records: The records of the runs, by the name of the run; at least one.
    """
    figure, scales = _figure(5 + 4 * len(records), 4.2), Scales.of(list(records.values()))
    runs = [
        Run(name, palette.run_colour(index), record) for index, (name, record) in enumerate(records.items())
    ]
    means, *maps = figure.subplots(1, 1 + len(runs), width_ratios=[1.4, *(1 for _ in runs)])
    _draw_lines(means, charts.mean_scores(runs, scales.unit))
    _draw_heat_maps(maps, [charts.score_matrix(run.record, scales) for run in runs])
    for axes, run in zip(maps, runs, strict=True):
        axes.set_title(_text(f"R of {run.name}"))
    return figure


def _figure(width: float, height: float) -> Figure:
    # The import takes long, so it waits for a picture. Unlike a figure of pyplot, this one does not become
    # the user's current figure.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _draw_lines(axes: Axes, chart: LineChart) -> None:
    background = axes.get_facecolor()
    for line in chart.lines:
        colour = line.colour.on(background)
        x, y = [point.x for point in line.points], [point.y for point in line.points]
        axes.plot(x, y, color=colour, marker=".", markersize=3)
        rings = [point for point in line.measured if point.boundary]
        axes.plot(
            [point.x for point in rings], [point.y for point in rings],
            color=colour, linestyle="", marker="o", markersize=4, markerfacecolor=background,
        )  # fmt: skip
    for position in range(1, len(chart.tasks)):
        axes.axvline(position, color="0.6", linestyle=":", linewidth=0.8, zorder=0)
    _frame(axes, chart)
    if chart.labels:
        _draw_labels(axes, chart.labels)
    elif chart.lines:
        _draw_strip(axes, chart)


def _draw_heat_maps(maps: Sequence[Axes], shown: Sequence[HeatMap]) -> None:
    """Draw heat maps that have the same scale, with the scale beside them."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    for axes, chart in zip(maps, shown, strict=True):
        _draw_heat_map(axes, chart)
    colours = ScalarMappable(Normalize(chart.scale.low, chart.scale.high), palette.HEAT)
    bar = axes.figure.colorbar(colours, ax=list(maps), label=_text(chart.unit))
    _set_ticks(bar.ax.yaxis, chart.scale)


def _draw_heat_map(axes: Axes, chart: HeatMap) -> None:
    from matplotlib.colors import to_rgba

    R = np.zeros((chart.tasks, chart.tasks, 4))  # transparent where not measured
    for cell in chart.cells:
        R[cell.learned, cell.task] = to_rgba(cell.fill)
        if chart.numbers:
            axes.annotate(
                cell.text, (cell.task, cell.learned), ha="center", va="center", color=cell.ink,
                fontsize=min(9, 320 / (chart.tasks * chart.digits)),  # so that the number fits into the cell
            )  # fmt: skip
    places, names = [index for index, _, _ in chart.names], [_text(name) for _, name, _ in chart.names]
    axes.set_xticks(places, names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(places, names)
    axes.set(title=chart.title, xlabel=chart.x_name, ylabel=chart.y_name)
    axes.imshow(R, interpolation="nearest")


def _draw_bars(axes: Axes, chart: BarChart) -> None:
    background = axes.get_facecolor()
    axes.bar(
        [bar.left for bar in chart.bars],
        [bar.top - bar.bottom for bar in chart.bars],
        width=[bar.right - bar.left for bar in chart.bars],
        bottom=[bar.bottom for bar in chart.bars],
        color=[bar.colour.on(background) for bar in chart.bars],
        align="edge",
    )
    _frame(axes, chart)
    _draw_labels(axes, chart.labels)


def _frame(axes: Axes, chart: LineChart | BarChart) -> None:
    """Draw the axes of a chart and the names of what they show."""
    axes.set(
        title=chart.title, xlabel=chart.x_name, ylabel=_text(chart.y_name),
        xlim=(chart.x.low, chart.x.high), ylim=(chart.y.low, chart.y.high),
    )  # fmt: skip
    _set_ticks(axes.xaxis, chart.x)
    _set_ticks(axes.yaxis, chart.y)
    axes.spines[["top", "right"]].set_visible(False)
    for line in axes.lines:
        line.set_clip_on(False)  # rings at the end of the sequence are drawn whole


def _set_ticks(shown: Any, axis: Axis) -> None:
    shown.set_ticks([value for value, _ in axis.ticks], [text for _, text in axis.ticks])


def _draw_labels(axes: Axes, labels: Sequence[Label]) -> None:
    """Write the labels beside a chart, the highest first."""
    from matplotlib.patches import Patch

    ordered = sorted(labels, key=lambda label: -label.y)
    colours = [label.colour.on(axes.get_facecolor()) for label in ordered]
    axes.legend(
        [Patch(color=colour) for colour in colours],
        [_text(f"{label.value}  {short(label.name, most=30)}") for label in ordered],
        fontsize="small", frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=0.8,
    )  # fmt: skip


def _draw_strip(axes: Axes, chart: LineChart) -> None:
    """Draw the colours of all lines beside a chart, with the names of the first and the last line."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    lines = chart.lines
    ends = [_text(short(line.name)) for line in (lines[0], lines[-1])]
    colours = ListedColormap([line.colour.on(axes.get_facecolor()) for line in lines])
    strip = axes.figure.colorbar(ScalarMappable(Normalize(0, len(lines)), colours), ax=axes)
    strip.set_ticks([0.5, len(lines) - 0.5], labels=ends)


def _text(name: str) -> str:
    """Return a name with its dollar signs escaped: matplotlib reads text between two as mathematics."""
    return name.replace("$", r"\$")
