"""Charts as numbers: what a page needs to draw them as SVG at any width; x and y in % of the plot."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.ticker import MaxNLocator

#: Stands for a number that there is not.
MISSING = "\N{EN DASH}"
#: Of the plots that have labels at their right, in pixels.
HEIGHT = 300
# From one label at the right to the next, in pixels.
_LABEL_STEP = 16
# The hues of Okabe and Ito's palette, which are told apart without red or green, on light and on dark pages.
_RUNS = (
    ("#0072b2", "#56b4e9"),
    ("#d55e00", "#f08030"),
    ("#008a64", "#2fc096"),
    ("#b5568f", "#dd95c2"),
    ("#a87400", "#e6b422"),
    ("#5a6270", "#b4bbc7"),
)


@dataclass(frozen=True)
class Colour:
    """A colour for a light page, and one for a dark page."""

    light: str
    dark: str


@dataclass(frozen=True)
class Axis:
    """A range of values with ticks on it: each where it lies, in %, and its text."""

    low: float
    high: float
    ticks: list[tuple[float, str]]

    @classmethod
    def of(cls, low: float, high: float, ticks: Iterable[tuple[float, str]]) -> Axis:
        """An axis with ticks given by their values.

        Example:
            >>> Axis.of(0.0, 4.0, [(1.0, "one")]).ticks
            [(25.0, 'one')]
        """
        bare = cls(low, high, [])
        return cls(low, high, [(bare.at(value), text) for value, text in ticks])

    @property
    def digits(self) -> int:
        """How long the longest of the texts is."""
        return max(len(text) for _, text in self.ticks)

    def at(self, value: float) -> float:
        """Where a value lies, in % of the axis."""
        return round(100 * (value - self.low) / (self.high - self.low), 2)


@dataclass(frozen=True)
class Mark:
    """A point in a chart, and what is shown when it is pointed at."""

    x: float
    y: float
    tip: str
    boundary: bool = False


@dataclass(frozen=True)
class Label:
    """A name at the right of a plot: where, in pixels from the top, and where what it names lies."""

    text: str
    value: str
    colour: Colour
    top: float
    of: float


@dataclass(frozen=True)
class Line:
    """One of a chart's lines, broken where a value is missing."""

    name: str
    colour: Colour
    marks: list[Mark]
    path: str


@dataclass(frozen=True)
class Bar:
    """A rectangle, in % of the plot."""

    x: float
    y: float
    width: float
    height: float
    colour: Colour
    tip: str


@dataclass(frozen=True)
class Cell:
    """A cell of a heat map, in % of it: its colour and that of the number in it."""

    x: float
    y: float
    fill: str
    ink: str
    text: str
    tip: str


# x, y, what is shown when it is pointed at, and whether it is that of a boundary.
Point = tuple[float, float, str, bool]


def number(value: float, digits: int = 3) -> str:
    """A number to so many significant digits, without an exponent unless it is very small.

    Example:
        >>> number(1234.5), number(0.01234), number(-0.5), number(float("nan"))
        ('1,234', '0.0123', '−0.5', '–')
    """
    if not math.isfinite(value):
        return MISSING
    if value and abs(value) < 1e-4:
        return with_minus(f"{value:.{digits}g}")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    text = f"{value:,.{decimals}f}"
    return with_minus(text.rstrip("0").rstrip(".") if "." in text else text)


def with_minus(number: str) -> str:
    """A number with the sign that is set for minus, as wide as a plus."""
    return number.replace("-", "\N{MINUS SIGN}")


def axis(values: Iterable[float]) -> Axis:
    """An axis from tick to tick that holds all finite values.

    Example:
        >>> axis([0.0, 83.0]).ticks
        [(0.0, '0'), (20.0, '20'), (40.0, '40'), (60.0, '60'), (80.0, '80'), (100.0, '100')]
    """
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if low == high:
        low, high = low - 0.05 * (abs(low) or 1), high + 0.05 * (abs(high) or 1)
    places = list(map(float, MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)))
    # Large numbers that are close together need more digits to be told apart.
    digits = next(
        (more for more in range(6, 16) if len({number(at, more) for at in places}) == len(places)), 16
    )
    return Axis.of(places[0], places[-1], [(place, number(place, digits)) for place in places])


def positions(tasks: int) -> Axis:
    """The axis of positions in a sequence of so many tasks, which ends with the last."""
    ticks = [place for place in MaxNLocator(10, integer=True).tick_values(0, tasks) if 0 <= place <= tasks]
    return Axis.of(0.0, float(tasks), [(place, f"{place:.0f}") for place in ticks])


def line(name: str, colour: Colour, x: Axis, y: Axis, points: Sequence[Point]) -> Line:
    """A line through points."""
    marks, path, move = [], [], "M"
    for place, value, tip, boundary in points:
        if math.isfinite(value):
            mark = Mark(x.at(place), round(100 - y.at(value), 2), tip, boundary)
            marks.append(mark)
            path.append(f"{move}{mark.x:g} {mark.y:g}")
        move = "L" if math.isfinite(value) else "M"
    return Line(name, colour, marks, "".join(path))


def labels(named: Iterable[tuple[str, str, Colour, float]]) -> list[Label]:
    """Labels, each with its value and as near to its height (in % from the top) as the others let it."""
    ordered = sorted(named, key=lambda label: label[3])
    tops: list[float] = []
    for *_, height in ordered:
        tops.append(max(height * HEIGHT / 100, tops[-1] + _LABEL_STEP if tops else 0))
    lowest = float(HEIGHT)
    for index in reversed(range(len(tops))):
        tops[index] = min(tops[index], lowest)
        lowest = tops[index] - _LABEL_STEP
    return [
        Label(text, value, colour, round(top, 1), round(height * HEIGHT / 100, 1))
        for (text, value, colour, height), top in zip(ordered, tops, strict=True)
    ]


def run_colour(index: int) -> Colour:
    """That of a run among others."""
    return Colour(*_RUNS[index % len(_RUNS)])


def task_colour(index: int, tasks: int) -> Colour:
    """That of a task, by its place in the sequence: dark enough on white, bright enough on black."""
    share = index / max(1, tasks - 1)
    return Colour(_of_map("plasma", 0.62 * share), _of_map("plasma", 0.42 + 0.53 * share))


def layer_colour(index: int, layers: int) -> Colour:
    """That of a layer, by its place in the network, just as light or dark."""
    share = index / max(1, layers - 1)
    return Colour(_of_map("viridis", 0.05 + 0.54 * share), _of_map("viridis", 0.35 + 0.6 * share))


def heat_colour(share: float) -> tuple[str, str]:
    """That of a heat map, from 0 to 1, and that of a number on it."""
    red, green, blue, _ = colormaps["viridis"](share)
    dark = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 < 0.18
    return _of_map("viridis", share), "#fff" if dark else "#000"


def _of_map(name: str, share: float) -> str:
    return to_hex(colormaps[name](share))
