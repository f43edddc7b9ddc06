"""Where the lines and the labels of a chart lie on the page of the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_blip.results.chart_types import Label, Line
from lightning_blip.results.scales import Axis

#: The height of the charts that have labels at their right, in pixels.
HEIGHT = 300
# The distance from one label to the next, in pixels.
_LABEL_STEP = 16


@dataclass(frozen=True)
class PlacedLabel:
    """A label at the right of a chart.

    Attributes:
        label: Its text and colour.
        top: Where it stands, in pixels from the top of the chart.
        of: Where the end of the line or bar lies that it names, in pixels from the top.
    """

    label: Label
    top: float
    of: float


def path(line: Line, x: Axis, y: Axis) -> str:
    """Return the ``d`` of an SVG path in % of the chart; it is interrupted where a value is missing.

    Example:
        >>> from lightning_blip.results.chart_types import Point
        >>> from lightning_blip.results.palette import run_colour
        >>> points = [Point(x, y, "") for x, y in [(0, 0), (1, 1), (2, float("nan")), (3, 1)]]
        >>> path(Line("first", run_colour(0), points), Axis(0.0, 4.0, []), Axis(0.0, 1.0, []))
        'M0 100L25 0M75 0'
    """
    parts, command = [], "M"
    for point in line.points:
        if point.measured:
            parts.append(f"{command}{x.at(point.x):g} {y.from_top(point.y):g}")
        command = "L" if point.measured else "M"
    return "".join(parts)


def placed(labels: Sequence[Label], y: Axis) -> list[PlacedLabel]:
    """Return each label as near to the height of what it names as the other labels allow.

    Args:
        labels: At most as many as fit above one another.
        y: The axis of the chart.
    """
    named = sorted(((label, y.from_top(label.y) * HEIGHT / 100) for label in labels), key=lambda one: one[1])
    tops: list[float] = []
    for _, height in named:
        tops.append(max(height, tops[-1] + _LABEL_STEP if tops else 0))
    lowest = float(HEIGHT)
    for index in reversed(range(len(tops))):
        tops[index] = min(tops[index], lowest)
        lowest = tops[index] - _LABEL_STEP
    return [
        PlacedLabel(label, round(top, 1), round(height, 1))
        for (label, height), top in zip(named, tops, strict=True)
    ]
