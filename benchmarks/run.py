"""Learn a stream with a method, seed by seed, and keep a record of each seed."""

from __future__ import annotations

import argparse
import ast
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.games import GAMES
from benchmarks.learning import STREAMS, Run
from benchmarks.markdown import spread
from benchmarks.methods import METHODS
from benchmarks.protocols import PROTOCOLS
from benchmarks.record import Record

# Methods for streams of data sets only, and methods for streams of games only.
_NEED_LABELS = ("lwf", "joint")
_NEED_RETURNS = ("single",)


def summary(run: Run, records: Sequence[Record]) -> str:
    """Return ACC and BWT over all seeds in one line: mean ± standard deviation of the sample."""
    seconds = statistics.mean(record.seconds for record in records)
    figures = [f"ACC {spread([record.ACC for record in records])} %"]
    transfers = [record.BWT for record in records if record.BWT is not None]
    if transfers:
        figures.append(f"BWT {spread(transfers, '+')} % (over T - 1)")
    return f"{', '.join(run.label)}, {len(records)} seeds: {', '.join(figures)}, {seconds:.0f} s per seed"


def parse_run(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> tuple[Run, Any]:
    """Read the arguments of a command that learns a stream.

    Args:
        parser: The parser of the command; the arguments that all such commands share are added to it.
        arguments: The command line; that of the process by default.

    Returns:
        The method on its stream, and all options.
    """
    parser.add_argument("stream", choices=STREAMS, metavar="STREAM", help=", ".join(STREAMS))
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with the data sets")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for the results")
    parser.add_argument("--tasks", type=int, help="number of tasks, instead of the stream's")
    parser.add_argument("--epochs", type=int, help="epochs per task, instead of the stream's")
    parser.add_argument(
        "--set",
        type=_setting,
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="arguments of the method",
    )
    options = parser.parse_args(arguments)
    lengths = {"tasks": options.tasks, "epochs": options.epochs}
    given = {name: length for name, length in lengths.items() if length is not None}
    run = Run(replace(STREAMS[options.stream], **given), options.method, dict(options.set))
    if run.protocol.name in GAMES and run.method in _NEED_LABELS:
        parser.error(f"--method {run.method} needs labels, which {run.protocol.name} does not have")
    if run.protocol.name in PROTOCOLS and run.method in _NEED_RETURNS:
        parser.error(f"--method {run.method} needs returns, which {run.protocol.name} does not have")
    try:
        METHODS[run.method].make(**run.settings)
    except (TypeError, ValueError) as error:
        parser.error(f"--method {run.method}: {error}")
    return run, options


def _setting(text: str) -> tuple[str, Any]:
    """Read ``name=value``; the value is a Python literal, or the text itself."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text} is not name=value")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def _parser() -> argparse.ArgumentParser:
    streams = [f"  {name:26}{protocol.description}" for name, protocol in STREAMS.items()]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__,
        epilog="\n".join(["streams:", *streams]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds: 0, 1, …")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every seed that has no record yet, and print the mean over all seeds."""
    run, options = parse_run(_parser(), arguments)
    records = [run.record(options.data, options.out, seed, options.device) for seed in range(options.seeds)]
    print(summary(run, records))


if __name__ == "__main__":
    main()
