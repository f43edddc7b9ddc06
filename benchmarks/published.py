"""Published figures beside the results of the same methods here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.markdown import markdown_table
from benchmarks.plan import Entry, Part
from benchmarks.rows import row_of


@dataclass(frozen=True)
class Published:
    """A published figure that a baseline is checked against.

    Attributes:
        stream: The name of the stream here.
        method: The name of the method.
        ACC: The published ACC, in %.
        source: The publication.
        within: The largest acceptable difference, in points; None for no limit.
    """

    stream: str
    method: str
    ACC: float
    source: str
    within: float | None = None


_GPM = "Saha et al., ICLR 2021, table 1"
_VAN_DE_VEN = "van de Ven and Tolias, arXiv 1904.07734, table 4, Domain-IL"
_VAN_DE_VEN_QUOTED = f"{_VAN_DE_VEN}; not read in the original"
_HSU = "Hsu et al., arXiv 1810.12488: logs of their code, mean of 10 runs"
PUBLISHED = (
    Published("permuted_mnist", "ewc", 89.97, _GPM, within=1.5),
    Published("permuted_mnist", "gpm", 93.91, _GPM, within=1.5),
    Published("permuted_mnist", "joint", 96.70, _GPM, within=1.0),
    Published("split_mnist_domain_drawn", "finetune", 59.21, _VAN_DE_VEN),
    Published("split_mnist_domain_drawn", "ewc", 64.32, _VAN_DE_VEN_QUOTED),
    Published("split_mnist_domain_drawn", "si", 65.36, _VAN_DE_VEN_QUOTED),
    Published("split_mnist_domain_drawn", "lwf", 71.50, _VAN_DE_VEN_QUOTED),
    Published("split_mnist_domain_drawn", "joint", 98.42, _VAN_DE_VEN),
    Published("split_mnist_domain", "mas", 72.75, _HSU),
)


def checks(folder: Path) -> str:
    """Return the table of the baselines beside published figures.

    Args:
        folder: The folder of the records.

    Returns:
        Markdown; an empty string if there are no records.
    """
    lines = []
    for figure in PUBLISHED:
        row = row_of(Entry(Part(figure.stream), figure.method), folder)
        if row is None:
            continue
        apart = row.acc - figure.ACC
        promise = f" (within {figure.within:g}: {_yes(abs(apart) <= figure.within)})" if figure.within else ""
        scores = f"{figure.ACC:.2f}", f"{row.acc:.2f}", f"{apart:+.2f}{promise}"
        lines.append([row.title, f"`{figure.stream}`", *scores, figure.source])
    header = ["method", "stream", "published ACC", "here", "apart", "source"]
    without = "For a frozen body no published figure on these streams was found."
    return f"{markdown_table(header, lines)}\n\n{without}" if lines else ""


def _yes(fact: bool) -> str:
    return "yes" if fact else "**no**"
