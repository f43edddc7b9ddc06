"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table.

    Args:
        header: What its columns are called.
        rows: As many cells each.

    Returns:
        Its lines.

    Example:
        >>> print(markdown_table(["what", "how much"], [["one", "1"]]))
        | what | how much |
        | --- | --- |
        | one | 1 |
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
