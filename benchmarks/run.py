"""Learns a stream with a method, seed by seed, and keeps a record of each seed."""

from __future__ import annotations

import argparse
import ast
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytorch_lightning as pl
import torch

from benchmarks.baselines import EWC, FineTuning
from benchmarks.machine import machine
from benchmarks.protocols import PROTOCOLS, Protocol
from benchmarks.record import Record
from benchmarks.trainer import quiet_trainer
from lightning_blip import BLIP, ForgettingCurves
from lightning_blip.boundaries import sequence
from lightning_blip.metrics import average_score, backward_transfer

METHODS: dict[str, Callable[..., pl.Callback]] = {
    "finetune": FineTuning,
    "ewc": EWC,
    "blip": BLIP,
    "blip-paper": BLIP.paper,
}


@dataclass(frozen=True)
class Run:
    """One method with its settings on one stream.

    Attributes:
        protocol: The stream.
        method: Name of the method.
        settings: Arguments of the method; its own defaults where not given.
    """

    protocol: Protocol
    method: str
    settings: dict[str, Any]

    @property
    def label(self) -> list[str]:
        """All that tells the run from others: stream, method, settings, and any unusual length."""
        usual = PROTOCOLS[self.protocol.name]
        given = dict(sorted(self.settings.items()))
        for name in ("tasks", "epochs"):
            if getattr(self.protocol, name) != getattr(usual, name):
                given[name] = getattr(self.protocol, name)
        return [self.protocol.name, self.method, *(f"{name}={value}" for name, value in given.items())]

    def path(self, folder: Path, seed: int) -> Path:
        """Where the record of a seed lies."""
        label = "-".join(quote(part, safe="=") for part in self.label)
        return folder / f"{label}-seed{seed}.json"

    def learn(self, data: Path, seed: int) -> Record:
        """Learns the whole stream in one fit, and prints where it is.

        The parameters that the network starts from, the tasks and the order of their samples depend on the
        seed alone, whatever the method.

        Args:
            data: Folder of the data.
            seed: Of all that is random.

        Returns:
            The record.
        """
        pl.seed_everything(seed, verbose=False)
        stream = self.protocol.stream(data, seed)
        module = self.protocol.module()
        method = METHODS[self.method](**self.settings)
        curves = ForgettingCurves(self.protocol.metric)
        progress = _Progress(seed, method, curves)
        with tempfile.TemporaryDirectory() as scratch:
            trainer = quiet_trainer(
                [method, curves, progress],
                default_root_dir=scratch,
                # The boundaries validate by themselves, and nothing else needs to.
                num_sanity_val_steps=0,
                check_val_every_n_epoch=stream.remaining_epochs + 1,
            )
            trainer.fit(module, datamodule=stream)
        R = 100 * curves.matrix
        return Record(
            stream=self.protocol.name,
            method=self.method,
            settings=self.settings,
            seed=seed,
            tasks=self.protocol.tasks,
            epochs=self.protocol.epochs,
            ACC=round(float(average_score(R)), 4),
            BWT=round(float(backward_transfer(R)), 4) if len(R) > 1 else None,
            R=[[None if math.isnan(score) else round(score, 4) for score in row] for row in R.tolist()],
            used_capacity=progress.used_capacity,
            seconds=round(progress.seconds, 3),
            machine=machine(),
            torch_version=torch.__version__,
        )


class _Progress(pl.Callback):
    """Prints a line after each task, and notes how much BLIP has frozen by then."""

    def __init__(self, seed: int, method: pl.Callback, curves: ForgettingCurves) -> None:
        self.seconds = 0.0
        self.used_capacity: list[float] = []
        self._seed = seed
        self._method = method
        self._curves = curves
        self._start = time.perf_counter()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds = time.perf_counter() - self._start
        R, task = 100 * self._curves.matrix, sequence(trainer).task.index
        line = (
            f"seed {self._seed}, task {task + 1} of {len(R)}: mean accuracy {float(average_score(R)):.2f} %, "
            f"just learned {float(R[task, task]):.2f} %, {self.seconds:.0f} s"
        )
        if isinstance(self._method, BLIP):
            self.used_capacity.append(round(self._method.used_capacity, 6))
            line += f", capacity used {self._method.used_capacity:.1%}"
        print(line, flush=True)


def summary(run: Run, records: Sequence[Record]) -> str:
    """ACC and BWT of all seeds in one line: mean ± standard deviation of the sample."""
    seconds = statistics.mean(record.seconds for record in records)
    figures = [f"ACC {_spread([record.ACC for record in records], '')} %"]
    transfers = [record.BWT for record in records if record.BWT is not None]
    if transfers:
        figures.append(f"BWT {_spread(transfers, '+')} % (over T - 1)")
    return f"{', '.join(run.label)}, {len(records)} seeds: {', '.join(figures)}, {seconds:.0f} s a seed"


def _spread(values: Sequence[float], sign: str) -> str:
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.2f}{deviation}"


def _setting(text: str) -> tuple[str, Any]:
    """``name=value``, the value a Python literal or else the text as it is."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text} is not name=value")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def parse_run(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> tuple[Run, Any]:
    """Reads the arguments of a command that learns a stream.

    Args:
        parser: Of the command, to which those arguments are added that all such commands share.
        arguments: The command line; that of the process by default.

    Returns:
        The method on its stream, and all options.
    """
    parser.add_argument("stream", choices=PROTOCOLS, metavar="STREAM", help=", ".join(PROTOCOLS))
    parser.add_argument("--data", type=Path, required=True, help="folder with the .npz files of the data")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of what comes out")
    parser.add_argument("--tasks", type=int, help="fewer or more than the stream has")
    parser.add_argument("--epochs", type=int, help="of each task, instead of the stream's")
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
    run = Run(replace(PROTOCOLS[options.stream], **given), options.method, dict(options.set))
    try:
        METHODS[run.method](**run.settings)
    except (TypeError, ValueError) as error:
        parser.error(f"--method {run.method}: {error}")
    return run, options


def _parser() -> argparse.ArgumentParser:
    streams = [f"  {name:26}{protocol.description}" for name, protocol in PROTOCOLS.items()]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__,
        epilog="\n".join(["streams:", *streams]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--seeds", type=int, default=3, help="how many: 0, 1, …")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs every seed that has no record yet, and prints the mean over all."""
    run, options = parse_run(_parser(), arguments)
    records = []
    for seed in range(options.seeds):
        path = run.path(options.out, seed)
        if path.exists():
            print(f"{path} is there already")
        else:
            run.learn(options.data, seed).write(path)
        records.append(Record.read(path))
    print(summary(run, records))


if __name__ == "__main__":
    main()
