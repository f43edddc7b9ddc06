"""The pictures of the table of results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.methods import METHODS
from benchmarks.rows import BASES, CEILINGS, Row

# Okabe and Ito's palette, safe for colour-blind readers; a method has the same colour in every picture.
_COLOURS = ("#999999", "#F0E442", "#E69F00", "#CC79A7", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#000000")
_MAPS_PER_ROW = 5


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw R of each method, averaged over the seeds, and the average score after each task.

    Args:
        rows: The results of the methods.
        path: The file to write.
    """
    learners = [row for row in rows if row.method not in CEILINGS]
    heights = -(-len(learners) // _MAPS_PER_ROW)
    figure = Figure(figsize=(16, 1.2 + 2.3 * heights), layout="constrained")
    left, right = cast(Any, figure.subfigures(1, 2, width_ratios=[5, 3]))
    lowest = min(float(np.nanmin(row.matrix)) for row in learners)
    maps = left.subplots(heights, _MAPS_PER_ROW, squeeze=False).flat
    for axes, row in zip(maps, learners, strict=False):
        image = axes.imshow(row.matrix, cmap="viridis", vmin=lowest, vmax=100, interpolation="nearest")
        axes.set_title(row.title, fontsize="small")
        axes.set(xticks=[], yticks=[])
    for axes in maps[len(learners) :]:
        axes.axis("off")
    left.supxlabel("score on task →", fontsize="small")
    left.supylabel("← after learning task", fontsize="small")
    left.colorbar(image, ax=left.axes, label="%", shrink=0.8)
    _draw_averages(right.subplots(), rows)
    figure.savefig(path, dpi=100)


def draw_curves(rows: Sequence[Row], path: Path) -> None:
    """Draw the score on each game over the training, averaged over the seeds.

    Args:
        rows: The results of the methods.
        path: The file to write.
    """
    games = list(rows[0].curves)
    figure = Figure(figsize=(16, 3.2), layout="constrained")
    for axes, game in zip(
        figure.subplots(1, len(games), sharey=True, squeeze=False).flat, games, strict=True
    ):
        for row in rows:
            position, score = row.curves[game]
            axes.plot(position, score, color=_colour(row), linewidth=_width(row), label=row.title)
        axes.axhline(100, color="0.3", linestyle="--", linewidth=1)
        axes.set(title=game, xlabel="tasks learned", xlim=(0, len(games)))
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("return, % of the single-task run's")
    figure.axes[-1].legend(fontsize="small", frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=100)


def _colour(row: Row) -> str:
    return _COLOURS[list(METHODS).index(row.method) % len(_COLOURS)]


def _width(row: Row) -> float:
    return 2.5 if row.method in BASES else 1.3


def _draw_averages(axes: Axes, rows: Sequence[Row]) -> None:
    for row in rows:
        if row.method in CEILINGS:
            axes.axhline(row.acc, color="0.3", linestyle="--", linewidth=1, label=row.title)
            continue
        axes.plot(
            range(1, len(row.matrix) + 1),
            np.nanmean(row.matrix, axis=1),
            color=_colour(row),
            linewidth=_width(row),
            marker="o" if row.method in BASES else ".",
            label=row.title,
        )
    axes.set(xlabel="tasks learned", ylabel="average score on them, %")
    axes.locator_params(axis="x", integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="small", frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
