"""Writes the table of results and its pictures, from the records alone."""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from benchmarks.markdown import markdown_table, spread
from benchmarks.methods import METHODS
from benchmarks.plan import PARTS, Entry, Job, Part
from benchmarks.record import Record

#: Those of the repository.
RECORDS = Path("benchmarks/records")

_BASES = ("blip", "blip-kronecker")
_CEILINGS = ("joint", "single")
# Okabe and Ito's colours, which colour-blind people can tell apart; a method keeps its own in every picture.
_COLOURS = ("#999999", "#F0E442", "#E69F00", "#CC79A7", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#000000")
_MAPS_A_ROW = 5
_TABLES = {
    "cpu": ("On two cores", "make benchmarks DATA=DIR"),
    "long": ("On two cores, longer", "make benchmarks DATA=DIR TABLE=long"),
    "games": ("Games", "make benchmarks TABLE=games"),
    "cuda": ("On a GPU", "make benchmarks DATA=DIR TABLE=cuda"),
}
_HEAD = """# Results

Written by `python -m benchmarks.results` from the records alone, one for each run: no figure is typed by hand
but the published ones.

- **ACC**, **BWT**, **FWT**: average score after the last task, backward transfer over the T − 1 tasks before
  it, forward transfer (the score on a task right before it is learned, less that of the untrained network);
  in %, mean ± standard deviation of the sample over the seeds. A task whose head is new has no forward
  transfer. How far one method is ahead of another is counted seed by seed.
- **bytes**: kept from task to task beside the network, for each of its parameters.
- **seconds**: of one run, its measurements included. Runs share their machine: a hint, no benchmark.
- Network, tasks, order of the samples and epochs are the same for all methods of a seed. BLIP runs at its
  defaults, unless its row says otherwise. Every other method has its one main setting searched, on the first
  three tasks of seed 0, over four values; on `three_sets` it is what was found on `split_cifar10`. A value
  with which the whole stream diverges gives way to the next best.
- Joint training has all tasks at once: the ceiling, no method. The ceiling of games are single-task runs: an
  agent of its own for each, trained as long.
- Scores of games are returns, as shares of the returns of the single-task runs with the same seed; those of
  `cartpole` as shares of 500, the most there is.
"""


@dataclass(frozen=True)
class Row:
    """A method's results on a stream.

    Attributes:
        method: Its name.
        records: One a seed.
    """

    method: str
    records: list[Record]

    @property
    def title(self) -> str:
        """The method and its settings."""
        settings = "".join(f", {name} = {value:g}" for name, value in self.records[0].settings.items())
        return METHODS[self.method].title + settings

    @property
    def acc(self) -> float:
        """Mean ACC."""
        return statistics.mean(record.ACC for record in self.records)

    @property
    def curves(self) -> dict[str, NDArray[np.float64]]:
        """Of each game (2, points): where it was scored, and the mean score over the seeds."""
        games = self.records[0].curves
        return {name: np.mean([record.curves[name] for record in self.records], axis=0).T for name in games}

    @property
    def matrix(self) -> NDArray[np.float64]:
        """R, its mean over the seeds, without the scores on tasks that were still to come."""
        R = np.mean([np.array(record.R, dtype=float) for record in self.records], axis=0)
        return np.where(np.tri(len(R), dtype=bool), R, np.nan)

    def cells(self) -> list[str]:
        """What the table says of it."""

        def figure(of: Callable[[Record], float | None], sign: str = "") -> str:
            values = [value for value in map(of, self.records) if value is not None]
            return spread(values, sign).replace("-", "−") if values else "–"

        return [
            self.title,
            str(len(self.records)),
            figure(lambda record: record.ACC),
            figure(lambda record: record.BWT, "+"),
            figure(lambda record: record.FWT, "+"),
            f"{statistics.mean(record.bytes_per_parameter for record in self.records):.1f}",
            f"{statistics.mean(record.seconds for record in self.records):.0f}",
        ]


@dataclass(frozen=True)
class Published:
    """A published figure that a baseline is checked against.

    Attributes:
        stream: Name of ours.
        method: Name of the method.
        ACC: In %.
        source: Where it stands.
        within: How many points apart are fine; None if none was promised.
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


def row_of(entry: Entry, folder: Path) -> Row | None:
    """What is recorded of a method on a stream.

    Args:
        entry: The method on its stream.
        folder: Of the records.

    Returns:
        Its results, with the setting that the search found best; None if there are none yet.
    """
    records = [Record.read(path) for path in _paths_of_best(entry, folder) if path.exists()]
    return Row(entry.method, records) if records else None


def _paths_of_best(entry: Entry, folder: Path) -> list[Path]:
    """Where the records of the seeds lie; none before the search is over."""
    searched = all(job.ended(folder) for job in entry.search)
    return [job.path(folder) for job in entry.seeds_of_best(folder)] if searched else []


def verdict(rows: Sequence[Row], behind: str) -> str:
    """Whether the better of BLIP's two bases is ahead of everything that it is compared with.

    Args:
        rows: The methods.
        behind: Why not, if it is not.

    Returns:
        One or two sentences, with the lead over the seeds that both have; nothing if there is nothing
        to compare.
    """
    ours = [row for row in rows if row.method in _BASES]
    others = [row for row in rows if row.method not in (*_BASES, *_CEILINGS)]
    if not ours or not others:
        return ""
    best, rival = (max(group, key=lambda row: row.acc) for group in (ours, others))
    first, second = (best, rival) if best.acc > rival.acc else (rival, best)
    theirs = {record.seed: record.ACC for record in second.records}
    lead = [record.ACC - theirs[record.seed] for record in first.records if record.seed in theirs]
    if not lead:
        return ""
    if first is best:
        return f"{best.title} is ahead of all others, by {spread(lead)} points of the next, {rival.title}."
    return f"{rival.title} is ahead of {best.title} by {spread(lead)} points. {behind}".strip()


def section(part: Part, folder: Path, pictures: Path, links: str) -> str:
    """A stream: its table, what it says, and the picture.

    Args:
        part: The stream.
        folder: Of the records.
        pictures: Folder that the picture goes to.
        links: That folder, as the table's links name it.

    Returns:
        Markdown; nothing if there are no records.
    """
    rows = [row for entry in part.entries if (row := row_of(entry, folder)) is not None]
    if not rows:
        return ""
    name = part.stream + (f"-{part.epochs}-epochs" if part.epochs else "")
    draw(rows, pictures / f"{name}.png")
    header = ["method", "seeds", "ACC", "BWT", "FWT", "bytes", "seconds"]
    protocol = part.protocol
    lines = [
        f"### `{part.stream}`",
        f"{protocol.description}. Here: {protocol.tasks} tasks, {protocol.epochs} epochs each.",
        markdown_table(header, [row.cells() for row in rows]),
        verdict(rows, part.behind),
        f"![{part.stream}]({links}/{name}.png)",
        *_of_games(rows, pictures / f"{name}-curves.png", links),
        _searches(part, folder),
    ]
    return "\n\n".join(line for line in lines if line)


def _of_games(rows: Sequence[Row], path: Path, links: str) -> list[str]:
    """What single-task runs come to, and the picture of what each method does over the whole training."""
    lines = []
    for row in rows:
        if row.method == "single":
            returns = np.array([record.ceilings for record in row.records]) * row.matrix[-1] / 100
            each = [f"{game} {spread(list(of))}" for game, of in zip(row.curves, returns.T, strict=True)]
            lines.append(f"Returns of the single-task runs: {', '.join(each)}.")
    players = [row for row in rows if row.curves and row.method not in _CEILINGS]
    if players:
        draw_curves(players, path)
        lines.append(f"![return of each game over the training]({links}/{path.name})")
    return lines


def table(name: str, folder: Path, pictures: Path, links: str) -> str:
    """A chapter: what makes it, where and how long, and its streams.

    Args:
        name: Of the table in ``PARTS``.
        folder: Of the records.
        pictures: Folder that the pictures go to.
        links: That folder, as the table's links name it.

    Returns:
        Markdown; nothing if there are no records.
    """
    parts = PARTS[name]
    sections = [text for part in parts if (text := section(part, folder, pictures, links))]
    if not sections:
        return ""
    entries = [entry for part in parts for entry in part.entries]
    paths = {job.path(folder) for entry in entries for job in entry.search}
    paths |= {path for entry in entries for path in _paths_of_best(entry, folder)}
    records = [Record.read(path) for path in paths if path.exists()]
    title, command = _TABLES[name]
    hours = sum(record.seconds for record in records) / 3600
    machines = "; ".join(sorted({record.machine for record in records}))
    made = f"`{command}`: {len(records)} runs, one after the other {hours:.1f} hours, on: {machines}."
    return "\n\n".join([f"## {title}", made, *sections])


def _searches(part: Part, folder: Path) -> str:
    """What each value of a setting came to in the search."""
    lines = []
    for entry in part.entries:
        if entry.search and all(job.ended(folder) for job in entry.search):
            values = ", ".join(_value(entry, job, folder) for job in entry.search)
            lines.append(f"{METHODS[entry.method].title}, {METHODS[entry.method].setting} = {values}")
    return f"Searched (ACC on the first three tasks): {'; '.join(lines)}." if lines else ""


def _value(entry: Entry, job: Job, folder: Path) -> str:
    """A value, and what it came to."""
    (value,) = job.run.settings.values()
    score = "diverged" if job.diverged(folder).exists() else f"{job.score(folder):.2f}"
    whole = entry.seeds(job.run.settings)
    later = (
        ", which diverged over the whole stream"
        if any(one.diverged(folder).exists() for one in whole)
        else ""
    )
    return f"{value:g}: {score}{later}"


def checks(folder: Path) -> str:
    """The baselines beside published figures.

    Args:
        folder: Of the records.

    Returns:
        Markdown.
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


def draw(rows: Sequence[Row], path: Path) -> None:
    """A picture: R of each method, averaged over seeds, and how the average score goes down.

    Args:
        rows: The methods.
        path: Of the file.
    """
    learners = [row for row in rows if row.method not in _CEILINGS]
    heights = -(-len(learners) // _MAPS_A_ROW)
    figure = Figure(figsize=(16, 1.2 + 2.3 * heights), layout="constrained")
    left, right = cast(Any, figure.subfigures(1, 2, width_ratios=[5, 3]))
    lowest = min(float(np.nanmin(row.matrix)) for row in learners)
    maps = left.subplots(heights, _MAPS_A_ROW, squeeze=False).flat
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
    """A picture: the score on each game, averaged over seeds, while it and the later ones are learned.

    Args:
        rows: The methods.
        path: Of the file.
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
    return 2.5 if row.method in _BASES else 1.3


def _draw_averages(axes: Axes, rows: Sequence[Row]) -> None:
    for row in rows:
        if row.method in _CEILINGS:
            axes.axhline(row.acc, color="0.3", linestyle="--", linewidth=1, label=row.title)
            continue
        axes.plot(
            range(1, len(row.matrix) + 1),
            np.nanmean(row.matrix, axis=1),
            color=_colour(row),
            linewidth=_width(row),
            marker="o" if row.method in _BASES else ".",
            label=row.title,
        )
    axes.set(xlabel="tasks learned", ylabel="average score on them, %")
    axes.locator_params(axis="x", integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="small", frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the table and its pictures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.results", description=__doc__)
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--to", type=Path, default=Path("benchmarks/RESULTS.md"))
    parser.add_argument("--pictures", type=Path, default=Path("docs/results"))
    options = parser.parse_args(arguments)
    options.pictures.mkdir(parents=True, exist_ok=True)
    links = Path(os.path.relpath(options.pictures, options.to.parent)).as_posix()
    tables = [table(name, options.records, options.pictures, links) for name in PARTS]
    checked = checks(options.records)
    published = f"## Baselines against published figures\n\n{checked}" if checked else ""
    chapters = [text for text in (_HEAD.strip(), *tables, published) if text]
    options.to.write_text("\n\n".join(chapters) + "\n")
    print(f"Written: {options.to}, with its pictures in {options.pictures}")


if __name__ == "__main__":
    main()
