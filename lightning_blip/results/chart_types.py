"""The kinds of charts, as data in the values of their axes: lines, heat maps and bars."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size

from lightning_blip.results.palette import Colour
from lightning_blip.results.scales import Axis


@dataclass(frozen=True)
class Point:
    """A point of a line; a value that was not measured is NaN, and interrupts the line.

    Attributes:
        x: Such as the position in the sequence, in tasks.
        y: The value.
        tip: The text that appears when a reader points at it.
        boundary: Whether the value was measured at the end of a task, after bits were frozen.
    """

    x: float
    y: float
    tip: str
    boundary: bool = False

    @property
    def measured(self) -> bool:
        """Whether the point can be drawn."""
        return math.isfinite(self.x) and math.isfinite(self.y)


@dataclass(frozen=True)
class Line:
    """A line of a chart."""

    name: str
    colour: Colour
    points: list[Point]

    @property
    def measured(self) -> list[Point]:
        """The points that can be drawn."""
        return [point for point in self.points if point.measured]


@dataclass(frozen=True)
class Label:
    """The name of a line or bar, written beside the chart, with its last value as text and its height y."""

    name: str
    value: str
    colour: Colour
    y: float


@dataclass(frozen=True)
class LineChart:
    """Lines over the position in the sequence.

    Attributes:
        title: What the chart shows.
        x: The axis of positions, in tasks.
        y: The axis of values.
        y_name: What the values are, with their unit.
        tasks: The names of all tasks; task i lies between the positions i and i + 1.
        lines: The lines with at least one point that can be drawn.
        labels: One per line, or none if there are too many.
    """

    title: str
    x: Axis
    y: Axis
    y_name: str
    tasks: list[str]
    lines: list[Line]
    labels: list[Label]

    x_name = "position in the sequence, in tasks"


@dataclass(frozen=True)
class Cell:
    """The score on one task after learning another, by their indices, as a cell of a heat map.

    Attributes:
        learned: The row.
        task: The column.
        fill: The colour of the cell.
        ink: The colour of the number in it.
        text: The number.
        tip: The text that appears when a reader points at it.
    """

    learned: int
    task: int
    fill: str
    ink: str
    text: str
    tip: str


@dataclass(frozen=True)
class HeatMap:
    """R as a heat map.

    Attributes:
        title: What the chart shows.
        tasks: The number of tasks: of rows, and of columns.
        scale: The axis of the colours.
        unit: What the scores are, with their unit.
        names: The index, the short name and the full name of each task whose name has room at the axes.
        cells: The entries of R that were measured.
        numbers: Whether there is room for the numbers in the cells.
    """

    title: str
    tasks: int
    scale: Axis
    unit: str
    names: list[tuple[int, str, str]]
    cells: list[Cell]
    numbers: bool

    x_name = "task scored"
    y_name = "task learned last"

    @property
    def digits(self) -> int:
        """The length of the longest number in a cell."""
        return max((len(cell.text) for cell in self.cells), default=1)


@dataclass(frozen=True)
class Bar:
    """A bar from left to right and from bottom to top, in the values of the axes."""

    left: float
    right: float
    bottom: float
    top: float
    colour: Colour
    tip: str


@dataclass(frozen=True)
class BarChart:
    """Bars, such as a histogram.

    Attributes:
        title: What the chart shows.
        x: The axis along which the bars stand.
        y: The axis of their heights.
        x_name: What x is.
        y_name: What y is, with its unit.
        bars: All bars.
        labels: The names beside the chart, if any.
    """

    title: str
    x: Axis
    y: Axis
    x_name: str
    y_name: str
    bars: list[Bar]
    labels: list[Label]


def short(name: str, most: int = 14) -> str:
    """Return a name that has room; of a longer name the middle is left out, since the ends often differ.

    Args:
        name: Any text.
        most: The width that there is room for, in columns of a terminal.

    Example:
        >>> short("permutation 12"), short("a task with a long name 12")
        ('permutation 12', 'a task…ame 12')
    """
    if cell_len(name) <= most:
        return name
    half = most // 2
    start, end = set_cell_size(name, half), set_cell_size(name[::-1], half - 1)[::-1]
    return f"{start.rstrip()}…{end.lstrip()}"
