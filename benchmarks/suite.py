"""Run all methods on all streams, each with its best setting; go on after an interruption."""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from queue import Queue

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table

from benchmarks import results
from benchmarks.learning import STREAMS
from benchmarks.machine import machine
from benchmarks.methods import METHODS
from benchmarks.plan import PARTS, Entry, Job
from benchmarks.record import Record

# For the C library: workers keep freed memory except that of whole data sets. Allocating it again takes 7 %
# of the time of convolutions.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**26), "MALLOC_TRIM_THRESHOLD_": str(2**30)}


class Suite:
    """All runs of a plan, several at a time.

    Args:
        planned: The methods on streams.
        data: The folder of the data.
        out: The folder of the records.
        device: ``"cpu"`` or ``"cuda"``.
        processes: The number of runs at a time.
    """

    def __init__(self, planned: Sequence[Entry], data: Path, out: Path, device: str, processes: int) -> None:
        self.planned = planned
        self.data = data
        self.out = out
        self.device = device
        self.processes = processes
        self.failed: dict[Path, BaseException] = {}
        self._running: dict[Future[None], Job] = {}
        self._where: dict[Path, tuple[str, float]] = {}
        self._look()

    def run(self) -> None:
        """Run everything that has no record yet."""
        os.environ.update(_KEEP_MEMORY)
        context = multiprocessing.get_context("spawn")
        threads = max(1, (os.cpu_count() or 1) // self.processes)
        console = Console()
        print(
            f"Runs to come: {len(self._to_come())}. "
            f"Runs with a record in {self.out} are done; another --out repeats all.",
            flush=True,
        )
        with (
            context.Manager() as manager,
            ProcessPoolExecutor(
                self.processes, context, initializer=torch.set_num_threads, initargs=(threads,)
            ) as pool,
            Live(console=console, auto_refresh=False, transient=True) as live,
        ):
            reports: Queue[tuple[Path, str, float]] = manager.Queue()
            while self._start(pool, reports):
                done, _ = wait(self._running, timeout=1.0, return_when=FIRST_COMPLETED)
                for path, where, share in _drained(reports):
                    self._where[path] = (where, share)
                    if not console.is_terminal:
                        console.print(f"[{self.time_left()} left] {where}", soft_wrap=True, markup=False)
                for future in done:
                    self._end(future)
                live.update(self._table(), refresh=True)

    def time_left(self) -> str:
        """Return how long the rest takes, from the epochs so far; "over" if a stream has had none yet."""
        epochs: dict[str, float] = {**self._epochs_left}
        for job in self._running.values():
            _, share = self._where.get(job.path(self.out), ("", 0.0))
            epochs[job.run.protocol.name] -= share * job.epochs
        unknown = any(count and stream not in self._seconds_per_epoch for stream, count in epochs.items())
        seconds = sum(count * self._seconds_per_epoch.get(stream, 0.0) for stream, count in epochs.items())
        minutes = round(seconds / self.processes / 60)
        return f"{'over ' if unknown else ''}{minutes // 60} h {minutes % 60:02} min"

    def _to_come(self) -> list[Job]:
        """Return all runs that have not ended."""
        return self._unique(job for entry in self.planned for job in entry.to_come(self.out))

    def _unique(self, jobs: Iterable[Job]) -> list[Job]:
        """Return each run once: streams may share a search."""
        return list({job.path(self.out): job for job in jobs}.values())

    def _look(self) -> None:
        """Read the records, which change only when a run ends."""
        self._ready = self._unique(job for entry in self.planned for job in entry.left(self.out))
        self._epochs_left: Counter[str] = Counter()
        for job in self._to_come():
            self._epochs_left[job.run.protocol.name] += job.epochs
        self._seconds_per_epoch = _seconds_per_epoch(self.out, self._epochs_left, machine(self.device))

    def _start(self, pool: ProcessPoolExecutor, reports: Queue[tuple[Path, str, float]]) -> bool:
        """Start as many runs as there are free processes; return whether any is running."""
        busy = {*(job.path(self.out) for job in self._running.values()), *self.failed}
        free = [job for job in self._ready if job.path(self.out) not in busy]
        for job in free[: self.processes - len(self._running)]:
            arguments = (job, self.data, self.out, self.device, reports)
            self._running[pool.submit(_work, *arguments)] = job
        return bool(self._running)

    def _end(self, future: Future[None]) -> None:
        job = self._running.pop(future)
        self._where.pop(job.path(self.out), None)
        error = future.exception()
        # A run that diverged has left a file.
        if error is not None and not job.diverged(self.out).exists():
            self.failed[job.path(self.out)] = error
        self._look()

    def _table(self) -> Table:
        """Return a table of the running runs."""
        table = Table(title=f"{self.time_left()} left", title_justify="left", box=None, show_header=False)
        for where, share in self._where.values():
            table.add_row(f"{share:.0%}", where)
        return table


def _work(job: Job, data: Path, out: Path, device: str, reports: Queue[tuple[Path, str, float]]) -> None:
    path = job.path(out)
    job.run.record(data, out, job.seed, device, lambda where, share: reports.put((path, where, share)))
    # The data of a run is part of reference cycles.
    gc.collect()


def _drained(reports: Queue[tuple[Path, str, float]]) -> Iterator[tuple[Path, str, float]]:
    while not reports.empty():
        yield reports.get()


def _seconds_per_epoch(out: Path, streams: Iterable[str], processor: str) -> dict[str, float]:
    """Return the seconds per epoch of each stream, from its records in ``out`` or in the repository.

    It takes only records from the same model of processor, with any number of threads.
    """
    rates = {}
    model, _, _ = processor.partition(",")
    for stream in streams:
        for folder in (out, results.RECORDS):
            records = [Record.read(path) for path in folder.glob(f"{stream}-*.json")]
            here = [record for record in records if record.machine.startswith(model)]
            if here:
                rates[stream] = statistics.mean(
                    record.seconds / (record.tasks * record.epochs) for record in here
                )
                break
    return rates


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suite", description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with the data sets")
    parser.add_argument(
        "--out",
        type=Path,
        default=results.RECORDS,
        help="folder of the records; the table and the pictures go there too if it is not the default",
    )
    parser.add_argument(
        "--table",
        choices=PARTS,
        default="cpu",
        help="streams for two cores in three hours (cpu), longer ones (long), streams for a GPU (cuda), and "
        "games for two cores (games)",
    )
    parser.add_argument("--processes", type=int, default=2, help="number of runs at a time")
    parser.add_argument(
        "--streams",
        nargs="+",
        choices=STREAMS,
        default=list(STREAMS),
        metavar="STREAM",
        help="only these streams of the table",
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what has no record yet, and write the table and the pictures."""
    options = _parser().parse_args(arguments)
    planned = [
        entry
        # The long runs come last in a table; started first, they leave no core idle at the end.
        for part in reversed(PARTS[options.table])
        for entry in part.entries
        if part.stream in options.streams and entry.method in options.methods
    ]
    device = "cuda" if options.table == "cuda" else "cpu"
    suite = Suite(planned, options.data, options.out, device, options.processes)
    suite.run()
    apart = ["--to", f"{options.out}/RESULTS.md", "--pictures", f"{options.out}/pictures"]
    results.main(["--records", str(options.out), *(apart if options.out != results.RECORDS else [])])
    for path, error in suite.failed.items():
        print(f"failed: {path.stem}: {error!r}")
    if suite.failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
