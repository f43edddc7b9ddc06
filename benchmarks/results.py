"""Write the table of results and its pictures, from the records alone."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.markdown import markdown_table, spread
from benchmarks.methods import METHODS
from benchmarks.plan import PARTS, Entry, Job, Part
from benchmarks.plots import draw, draw_curves
from benchmarks.published import checks
from benchmarks.record import Record
from benchmarks.rows import BASES, CEILINGS, Row, paths_of_best, row_of

#: The records of the repository.
RECORDS = Path("benchmarks/records")

_TABLES = {
    "cpu": ("On two cores", "make benchmarks DATA=DIR"),
    "long": ("On two cores, longer", "make benchmarks DATA=DIR TABLE=long"),
    "games": ("Games", "make benchmarks TABLE=games"),
    "cuda": ("On a GPU", "make benchmarks DATA=DIR TABLE=cuda"),
}
_HEAD = """# Results

Written by `python -m benchmarks.results` from the records of the runs. Only the published figures are typed
by hand.

- **ACC**, **BWT**, **FWT**: the average score after the last task, the backward transfer over the T − 1 tasks
  before it, and the forward transfer (the score on a task right before it is learned, minus the score of the
  untrained network); in %, mean ± standard deviation of the sample over the seeds. A task with a new head has
  no forward transfer. The lead of one method over another is computed seed by seed.
- **bytes**: the memory per parameter that a method keeps from task to task, beside the network.
- **seconds**: the duration of one run, its measurements included. Runs share their machine, so that this is a
  rough figure.
- Network, tasks, order of the samples and epochs are the same for all methods of a seed. BLIP runs at its
  defaults unless its row says otherwise. The main setting of every other method is searched over four values,
  on the first three tasks of seed 0; `three_sets` takes the setting found on `split_cifar10`. If the whole
  stream diverges with the best value, the next best is taken.
- Joint training sees all tasks at once: it is the ceiling, not a method. The ceiling of games is a separate
  agent for each game, trained as long (single-task runs).
- Scores of games are returns, as shares of the returns of the single-task runs with the same seed; on
  `cartpole` as shares of 500, the highest return.
"""


def verdict(rows: Sequence[Row], behind: str) -> str:
    """Return which is ahead: the better of BLIP's two bases, or the best of the other methods.

    Args:
        rows: The results of the methods.
        behind: The reason why BLIP is behind, if it is.

    Returns:
        One or two sentences, with the lead over the seeds of both methods; an empty string if there is
        nothing to compare.
    """
    ours = [row for row in rows if row.method in BASES]
    others = [row for row in rows if row.method not in (*BASES, *CEILINGS)]
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
    """Return the section of a stream: its table, who is ahead, and the picture.

    Args:
        part: The stream.
        folder: The folder of the records.
        pictures: The folder that the picture is written to.
        links: The same folder, as a link in the text.

    Returns:
        Markdown; an empty string if there are no records.
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
    """Return the returns of single-task runs, and the picture of the scores over the whole training."""
    lines = []
    for row in rows:
        if row.method == "single":
            returns = np.array([record.ceilings for record in row.records]) * row.matrix[-1] / 100
            each = [f"{game} {spread(list(of))}" for game, of in zip(row.curves, returns.T, strict=True)]
            lines.append(f"Returns of the single-task runs: {', '.join(each)}.")
    players = [row for row in rows if row.curves and row.method not in CEILINGS]
    if players:
        draw_curves(players, path)
        lines.append(f"![return of each game over the training]({links}/{path.name})")
    return lines


def table(name: str, folder: Path, pictures: Path, links: str) -> str:
    """Return a chapter: the command, the machines, the duration, and the sections of its streams.

    Args:
        name: The name of the table in ``PARTS``.
        folder: The folder of the records.
        pictures: The folder that the pictures are written to.
        links: The same folder, as a link in the text.

    Returns:
        Markdown; an empty string if there are no records.
    """
    parts = PARTS[name]
    sections = [text for part in parts if (text := section(part, folder, pictures, links))]
    if not sections:
        return ""
    entries = [entry for part in parts for entry in part.entries]
    paths = {job.path(folder) for entry in entries for job in entry.search}
    paths |= {path for entry in entries for path in paths_of_best(entry, folder)}
    records = [Record.read(path) for path in paths if path.exists()]
    title, command = _TABLES[name]
    hours = sum(record.seconds for record in records) / 3600
    machines = "; ".join(sorted({record.machine for record in records}))
    made = f"`{command}`: {len(records)} runs, one after the other {hours:.1f} hours, on: {machines}."
    return "\n\n".join([f"## {title}", made, *sections])


def _searches(part: Part, folder: Path) -> str:
    """Return the score of each value that was searched."""
    lines = []
    for entry in part.entries:
        if entry.search and all(job.ended(folder) for job in entry.search):
            values = ", ".join(_value(entry, job, folder) for job in entry.search)
            lines.append(f"{METHODS[entry.method].title}, {METHODS[entry.method].setting} = {values}")
    return f"Searched (ACC on the first three tasks): {'; '.join(lines)}." if lines else ""


def _value(entry: Entry, job: Job, folder: Path) -> str:
    """Return a searched value with its score."""
    (value,) = job.run.settings.values()
    score = "diverged" if job.diverged(folder).exists() else f"{job.score(folder):.2f}"
    whole = entry.seeds(job.run.settings)
    later = (
        ", which diverged over the whole stream"
        if any(one.diverged(folder).exists() for one in whole)
        else ""
    )
    return f"{value:g}: {score}{later}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the table and its pictures."""
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
