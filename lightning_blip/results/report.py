"""The report: one page that shows what a run learned, kept and froze, or several runs side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from lightning_blip.results import charts, palette, svg, tables
from lightning_blip.results.charts import Run, Scales
from lightning_blip.results.record import RECORD, RunRecord


def report(runs: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write one page that shows a run, or several side by side: scores, curves, R, capacity and settings.

    The page is a single file that needs no network. It shows what :class:`ForgettingCurves` recorded.

    Args:
        runs: Files ``forgetting.json``, or folders that hold one. In a folder that only has such files
            further below, the newest of them is taken.
        output: The file of the page. By default ``report.html`` in the folder of the record, or in the
            folder that all records have in common.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: If there is no record in one of the folders.
        ValueError: If ``runs`` is empty, a record cannot be read, or the runs were scored by different
            metrics.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> record = RunRecord("val_acc", ["first"], [[0.5]], [], [], [], {})
        >>> with TemporaryDirectory() as folder:
        ...     record.write(Path(folder) / "forgetting.json")
        ...     print(report([folder]).name)
        report.html
    """
    paths = list(dict.fromkeys(_find(Path(run)).resolve() for run in runs))
    if not paths:
        raise ValueError("runs=[] must name at least one folder with a forgetting.json")
    records = [RunRecord.read(path) for path in paths]
    measured = list(dict.fromkeys(record.metric for record in records))
    if len(measured) > 1:
        raise ValueError(
            f"runs={[str(run) for run in runs]} were scored by different metrics, {measured}: compare runs "
            "of the same metric"
        )
    named = [
        Run(name, palette.run_colour(index), record)
        for index, (name, record) in enumerate(zip(_names(paths), records, strict=True))
    ]
    page = Path(output or Path(os.path.commonpath([path.parent for path in paths])) / "report.html")
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(_page(named), encoding="utf-8")
    return page


def _find(run: Path) -> Path:
    """Return the record that a path names, or the newest record below it."""
    if run.is_file():
        return run
    if (run / RECORD).is_file():
        return run / RECORD
    below = sorted(run.rglob(RECORD), key=lambda path: path.stat().st_mtime)
    if not below:
        raise FileNotFoundError(
            f"there is no {RECORD} in or below runs={str(run)!r}: name the log folder of a fit that had the "
            "callback ForgettingCurves, which writes it"
        )
    return below[-1]


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the folders' paths that differ from one another."""
    for parts in range(1, 1 + max(len(path.parts) for path in paths)):
        names = ["/".join(path.parent.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _page(runs: Sequence[Run]) -> str:
    """Return the HTML of the page, which is drawn by the template beside this file."""
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals |= {"path": svg.path, "placed": svg.placed, "height": svg.HEIGHT}
    records = [run.record for run in runs]
    scales = Scales.of(records)
    frozen = [run for run in runs if run.record.frozen]
    predicted = [run for run in runs if run.record.predicted]
    return environment.from_string(template).render(
        runs=runs,
        tasks=list(dict.fromkeys(len(record.tasks) for record in records)),
        metric=records[0].metric,
        unit=scales.unit,
        summary=tables.summary(records, scales.unit),
        curves=[(run, charts.task_scores(run.record, scales)) for run in runs],
        means=charts.mean_scores(runs, scales.unit) if len(runs) > 1 else None,
        maps=[(run, charts.score_matrix(run.record, scales)) for run in runs],
        heat=scales.heat,
        heat_colours=[palette.heat_colour(step / 20)[0] for step in range(21)],
        capacities=[(run, charts.used_capacity(run.record, scales)) for run in frozen],
        histograms=charts.bit_histograms(runs),
        predicted=charts.predicted_forgetting(predicted) if predicted else None,
        settings=tables.settings(records),
    )
