"""Figures and tables as text."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown.

    Args:
        header: The titles of the columns.
        rows: The cells of each row, one per column.

    Returns:
        The lines of the table.

    Example:
        >>> print(markdown_table(["what", "how much"], [["one", "1"]]))
        | what | how much |
        | --- | --- |
        | one | 1 |
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(values: Sequence[float], sign: str = "") -> str:
    """Return mean ± standard deviation of the sample; for one value, the value.

    Args:
        values: The sample.
        sign: The sign option of Python's format, ``"+"`` to show positive signs.

    Returns:
        The text.

    Example:
        >>> spread([1.0, 3.0]), spread([0.5], "+")
        ('2.00 ± 1.41', '+0.50')
    """
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.2f}{deviation}"
