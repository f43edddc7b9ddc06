"""Axes with their ticks, and numbers as text: what tables and charts have in common."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from matplotlib.ticker import MaxNLocator

from lightning_blip.results.record import RunRecord

#: Stands for a missing number.
MISSING = "\N{EN DASH}"


@dataclass(frozen=True)
class Axis:
    """A range of values with ticks.

    Attributes:
        low: Where the axis begins.
        high: Where it ends.
        ticks: The value of each tick, and its text.

    Example:
        >>> axis = Axis(0.0, 4.0, [(1.0, "one")])
        >>> axis.at(1.0), axis.from_top(1.0)
        (25.0, 75.0)
    """

    low: float
    high: float
    ticks: list[tuple[float, str]]

    @property
    def digits(self) -> int:
        """The length of the longest text of a tick."""
        return max(len(text) for _, text in self.ticks)

    def at(self, value: float) -> float:
        """Return the place of a value, in % of the axis."""
        return round(100 * (value - self.low) / (self.high - self.low), 2)

    def from_top(self, value: float) -> float:
        """Return the place of a value, in % of the axis, counted from its end."""
        return round(100 - self.at(value), 2)


@dataclass(frozen=True)
class Unit:
    """The unit of scores: % if all scores lie within 0 to 1, else that of the metric.

    Example:
        >>> unit = Unit(percent=True)
        >>> unit.of_score(0.5), unit.text(50.0), unit.full(50.0), unit.name("val_acc")
        (50.0, '50.0', '50.0 %', 'val_acc in %')
    """

    percent: bool

    @classmethod
    def of(cls, records: Iterable[RunRecord]) -> Unit:
        """Return the unit that fits the scores of all records."""
        scores = [score for record in records for score in record.all_scores]
        return cls(all(0 <= score <= 1 for score in scores if math.isfinite(score)))

    def of_score(self, score: float) -> float:
        """Return a score, as it was logged, in this unit."""
        return 100 * score if self.percent else score

    def text(self, value: float, decimals: int = 1) -> str:
        """Return a value in this unit as text, without the unit."""
        if not self.percent or not math.isfinite(value):
            return number(value, 2 + decimals)
        return with_minus(f"{round(value, decimals) + 0.0:.{decimals}f}")  # no minus before 0

    def full(self, value: float) -> str:
        """Return a value in this unit as text, with the unit."""
        return self.text(value) + (" %" if self.percent and math.isfinite(value) else "")

    def name(self, metric: str) -> str:
        """Return the name of a metric, with the unit."""
        return f"{metric} in %" if self.percent else metric


def number(value: float, digits: int = 3) -> str:
    """Return a number as text, rounded to significant digits; exponents stand only below 0.0001.

    Args:
        value: The number.
        digits: The number of significant digits; those before the decimal point are always kept.

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
    """Return the text of a number with a minus sign, as wide as a plus, in place of the hyphen."""
    return number.replace("-", "\N{MINUS SIGN}")


def axis_over(values: Iterable[float]) -> Axis:
    """Return an axis that begins and ends with a tick and holds all finite values.

    Args:
        values: Any numbers; those that are not finite do not count.

    Example:
        >>> axis_over([0.0, 83.0]).ticks
        [(0.0, '0'), (20.0, '20'), (40.0, '40'), (60.0, '60'), (80.0, '80'), (100.0, '100')]
    """
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if low == high:
        low, high = low - 0.05 * (abs(low) or 1), high + 0.05 * (abs(high) or 1)
    places = list(map(float, MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)))
    # Ticks at large numbers that are close together need more digits to differ.
    digits = next(
        (more for more in range(6, 16) if len({number(at, more) for at in places}) == len(places)), 16
    )
    return Axis(places[0], places[-1], [(place, number(place, digits)) for place in places])


def sequence_axis(tasks: int) -> Axis:
    """Return the axis of positions in a sequence, from 0 to the number of tasks.

    Args:
        tasks: The number of tasks.

    Example:
        >>> sequence_axis(2).ticks
        [(0.0, '0'), (1.0, '1'), (2.0, '2')]
    """
    places = map(float, MaxNLocator(10, integer=True).tick_values(0, tasks))
    return Axis(0.0, float(tasks), [(place, f"{place:.0f}") for place in places if 0 <= place <= tasks])
