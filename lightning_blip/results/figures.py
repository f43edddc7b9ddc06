"""Draws the record of a run: the curves, R, and the capacity used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lightning_blip.results.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# More tasks than this, and numbers in the cells of the heat map are too small to read.
_MOST_NUMBERS = 12
# As many lines of a legend fit beside a plot.
_MOST_LINES = 20
# The largest layers that are shown by themselves, the others together.
_MOST_LAYERS = 10


def overview(record: RunRecord) -> Figure:
    """The curves and R side by side.

    Args:
        record: With one score at least.

    Returns:
        The picture.
    """
    figure = _figure(13, 4.8)
    curves, matrix = figure.subplots(1, 2, width_ratios=[3, 2])
    _draw_curves(curves, record)
    _draw_matrix(figure, matrix, record)
    return figure


def curves_picture(record: RunRecord) -> Figure:
    """The score on each task while the sequence is learned.

    Args:
        record: With one score at least.

    Returns:
        The picture.
    """
    figure = _figure(8, 4.8)
    _draw_curves(figure.subplots(), record)
    return figure


def matrix_picture(record: RunRecord) -> Figure:
    """R as a heat map.

    Args:
        record: With one score at least.

    Returns:
        The picture.
    """
    figure = _figure(6, 4.8)
    _draw_matrix(figure, figure.subplots(), record)
    return figure


def capacity_picture(record: RunRecord) -> Figure:
    """The share of all bits that each layer has frozen after each task, stacked.

    Args:
        record: Of a run with BLIP.

    Returns:
        The picture.
    """
    from matplotlib import colormaps

    figure = _figure(8, 4.8)
    axes = figure.subplots()
    frozen = record.frozen
    groups = frozen[-1].grouped(_MOST_LAYERS)
    bottom = np.zeros(len(frozen))
    for index, (name, layers) in enumerate(groups.items()):
        share = np.array([100 * one.share_of_bits(layers) for one in frozen])
        colour = colormaps["cividis"](index / max(1, len(groups) - 1))
        axes.bar(range(len(frozen)), share, bottom=bottom, color=colour, label=name)
        bottom += share
    _name_ticks(axes, [one.task for one in frozen], "x")
    axes.set(xlabel="after learning task", ylabel="frozen bits, % of all", title="Capacity used by layer")
    axes.spines[["top", "right"]].set_visible(False)
    _legend_beside(axes, title="layer", reverse=True)  # from the top down, as the bars stand
    return figure


def _figure(width: float, height: float) -> Figure:
    # Drawing is rare and matplotlib slow to import; a Figure of one's own leaves pyplot's state alone.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _draw_curves(axes: Axes, record: RunRecord) -> None:
    from matplotlib import colormaps

    tasks = record.seen
    for index, name in enumerate(tasks):
        scores = [score for score in record.scores if score.task == name]
        axes.plot(
            [score.position for score in scores],
            [score.score for score in scores],
            color=colormaps["viridis"](0.9 * index / max(1, len(tasks) - 1)),  # its yellow is too pale
            marker="." if len(scores) == 1 else None,
            label=name,
        )
    for position in sorted({score.position for score in record.scores if score.boundary}):
        axes.axvline(position, color="0.8", linestyle="--", linewidth=1, zorder=0)
    axes.set(xlabel="tasks learned", ylabel=record.metric)
    axes.set_title("Score on each task while the sequence is learned")
    axes.locator_params(axis="x", integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    _legend_beside(axes, title="task", ncols=1 + (len(tasks) - 1) // _MOST_LINES)


def _draw_matrix(figure: Figure, axes: Axes, record: RunRecord) -> None:
    R = np.array(record.matrix)
    image = axes.imshow(R, cmap="viridis", interpolation="nearest")
    if len(R) <= _MOST_NUMBERS:
        low, high = image.get_clim()
        for i, j in np.argwhere(np.isfinite(R)):
            axes.text(
                j, i, f"{R[i, j]:.2f}", ha="center", va="center", fontsize="small",
                color="white" if 2 * R[i, j] < low + high else "black",
            )  # fmt: skip
    _name_ticks(axes, record.tasks, "both")
    axes.set(xlabel="score on task", ylabel="after learning task", title="R: scores after each task")
    figure.colorbar(image, ax=axes, label=record.metric)


def _legend_beside(axes: Axes, **options: Any) -> None:
    axes.legend(fontsize="small", frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), **options)


def _name_ticks(axes: Axes, names: list[str], which: Literal["x", "both"]) -> None:
    """A tick for each task where there is room for its name."""
    if len(names) > _MOST_NUMBERS:
        axes.locator_params(axis=which, integer=True)
        return
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    if which == "both":
        axes.set_yticks(range(len(names)), names)
