"""Learns a stream with a method, seed by seed, and keeps a record of each seed."""

from __future__ import annotations

import argparse
import ast
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor

from benchmarks.agents import KeepAgents
from benchmarks.games import GAMES, Games
from benchmarks.joint import learn_jointly
from benchmarks.machine import machine
from benchmarks.memory import held_bytes
from benchmarks.methods import METHODS
from benchmarks.networks import Classifier
from benchmarks.ppo import PPO
from benchmarks.protocols import PROTOCOLS, Protocol
from benchmarks.record import Record
from benchmarks.scoring import accuracy
from benchmarks.trainer import quiet_trainer
from lightning_blip import BLIP, EnvSequence, ForgettingCurves, Task, TaskHeads, TaskSequenceDataModule
from lightning_blip.metrics import average_score, backward_transfer, forward_transfer
from lightning_blip.tasks.sequence import sequence

#: By name, of data sets and of environments.
STREAMS: dict[str, Protocol | Games] = {**PROTOCOLS, **GAMES}
# Methods that need the samples and labels of data sets, and those that need returns.
_NEED_LABELS = ("lwf", "joint")
_NEED_RETURNS = ("single",)

#: Is told where a run is, in words, and how much of it is done, 0 to 1.
Report = Callable[[str, float], None]


def tell(where: str, _share: float) -> None:
    """Prints where a run is."""
    print(where, flush=True)


@dataclass(frozen=True)
class Run:
    """One method with its settings on one stream.

    Attributes:
        protocol: The stream.
        method: Name of the method.
        settings: Arguments of the method; its own defaults where not given.
    """

    protocol: Protocol | Games
    method: str
    settings: dict[str, Any]

    @property
    def label(self) -> list[str]:
        """All that tells the run from others: stream, method, settings, and any unusual length."""
        usual = STREAMS[self.protocol.name]
        given = dict(sorted(self.settings.items()))
        for name in ("tasks", "epochs"):
            if getattr(self.protocol, name) != getattr(usual, name):
                given[name] = getattr(self.protocol, name)
        return [self.protocol.name, self.method, *(f"{name}={value}" for name, value in given.items())]

    def path(self, folder: Path, seed: int) -> Path:
        """Where the record of a seed lies."""
        label = "-".join(quote(part, safe="=") for part in self.label)
        return folder / f"{label}-seed{seed}.json"

    def diverged(self, folder: Path, seed: int) -> Path:
        """Where it says so of a seed that diverged, which has no record."""
        return self.path(folder, seed).with_suffix(".diverged")

    def record(self, data: Path, out: Path, seed: int, device: str = "cpu", report: Report = tell) -> Record:
        """The record of a seed: as it is kept, or else of the stream learned now.

        Args:
            data: Folder of the data.
            out: Folder of the records, and of what a run that is broken off goes on from.
            seed: Of all that is random.
            device: ``"cpu"`` or ``"cuda"``.
            report: Is told after each epoch where the run is.

        Returns:
            The record.

        Raises:
            FloatingPointError: If the weights diverge.
        """
        path = self.path(out, seed)
        if path.exists():
            report(f"{path} is there already", 1.0)
        else:
            unfinished = path.with_suffix(".ckpt")
            try:
                ceilings = self._ceilings(data, out, seed, device, report)
                self.learn(data, seed, device, report, unfinished, ceilings).write(path)
            except FloatingPointError as error:
                out.mkdir(parents=True, exist_ok=True)
                self.diverged(out, seed).write_text(f"{error}\n")
                unfinished.unlink(missing_ok=True)
                raise
            unfinished.unlink(missing_ok=True)
        return Record.read(path)

    def _ceilings(self, data: Path, out: Path, seed: int, device: str, report: Report) -> list[float] | None:
        """What agents of their own come to in each game, where it is not known what there is to get."""
        games = self.protocol
        if not isinstance(games, Games) or games.ceilings or self.method == "single":
            return None
        whole = replace(games, tasks=STREAMS[games.name].tasks)
        single = Run(whole, "single", {}).record(data, out, seed, device, report)
        assert single.ceilings is not None
        return single.ceilings[: games.tasks]

    def learn(
        self,
        data: Path,
        seed: int,
        device: str = "cpu",
        report: Report = tell,
        unfinished: Path | None = None,
        ceilings: list[float] | None = None,
    ) -> Record:
        """Learns the whole stream in one fit, and says where it is.

        The parameters that the network starts from, the tasks and the order of their samples depend on the
        seed alone, whatever the method.

        Args:
            data: Folder of the data.
            seed: Of all that is random.
            device: ``"cpu"`` or ``"cuda"``.
            report: Is told after each epoch where the run is.
            unfinished: File that holds, after each task, or each epoch of a game, all that is needed to go
                on; gone on from if it is there.
            ceilings: Of each task the score that counts as 100 %, if the stream does not say.

        Returns:
            The record.
        """
        if self.method == "single":
            return self._learn_alone(data, seed, device, report)
        pl.seed_everything(seed, verbose=False)
        stream = self.protocol.stream(data, seed)
        module = self.protocol.module()
        ceilings = self.protocol.ceilings or ceilings
        watch = _Watch(self, seed, report, ceilings)
        R = torch.full((len(stream), len(stream)), torch.nan)
        if self.method == "joint":
            R[-1] = learn_jointly(
                cast(Classifier, module),
                cast(TaskSequenceDataModule, stream),
                self.protocol.epochs,
                self.protocol.batch_size,
                seed,
                [watch],
                accelerator=device,
            )
        else:
            R = self._learn_in_sequence(module, stream, watch, device, unfinished)
        return Record(
            stream=self.protocol.name,
            method=self.method,
            settings=self.settings,
            seed=seed,
            tasks=self.protocol.tasks,
            epochs=self.protocol.epochs,
            ACC=round(100 * float(average_score(R)), 4),
            BWT=_percent(backward_transfer(R)),
            FWT=_percent(forward_transfer(R, watch.at_first)) if watch.at_first else None,
            R=[[_percent(score) for score in row] for row in R],
            used_capacity=watch.used_capacity,
            bytes_per_parameter=round(
                held_bytes(watch.method, module) / sum(theta.numel() for theta in module.parameters()), 2
            ),
            seconds=round(watch.seconds, 3),
            machine=machine(device),
            torch_version=torch.__version__,
            ceilings=ceilings,
            curves=watch.points,
        )

    def _learn_alone(self, data: Path, seed: int, device: str, report: Report) -> Record:
        """A record of agents that learn a game each."""
        games = cast(Games, self.protocol)
        records = [
            Run(game, "finetune", {}).learn(data, seed, device, _part_of(report, index, games.tasks))
            for index, game in enumerate(games.alone())
        ]
        scores = [record.ACC for record in records]
        returns = [round(score / 100, 4) for score in scores]
        if games.best is None:
            scores = [100.0] * games.tasks
        R: list[list[float | None]] = [[None] * games.tasks for _ in scores]
        R[-1] = [*scores]
        return replace(
            records[-1],
            method=self.method,
            tasks=games.tasks,
            ACC=round(statistics.mean(scores), 4),
            R=R,
            seconds=round(sum(record.seconds for record in records), 3),
            ceilings=games.ceilings or returns,
            curves={name: points for record in records for name, points in record.curves.items()},
        )

    def _learn_in_sequence(
        self,
        module: Classifier | PPO,
        stream: TaskSequenceDataModule | EnvSequence,
        watch: _Watch,
        device: str,
        unfinished: Path | None,
    ) -> Tensor:
        """R of a network that learns task after task."""
        callbacks = [watch.method, watch.curves, watch]
        if unfinished is not None:
            callbacks.append(_saves(unfinished, self.protocol.save_every))
            if isinstance(self.protocol, Games):
                callbacks.append(KeepAgents(unfinished.with_suffix(""), self.protocol))
        with tempfile.TemporaryDirectory() as scratch:
            trainer = quiet_trainer(
                callbacks,
                accelerator=device,
                default_root_dir=scratch,
                enable_checkpointing=unfinished is not None,
                num_sanity_val_steps=0,
                check_val_every_n_epoch=self.protocol.validate_every,
            )
            begun = unfinished if unfinished is not None and unfinished.exists() else None
            trainer.fit(module, datamodule=stream, ckpt_path=begun)
        R = watch.curves.matrix.clone()
        R.diagonal(offset=1)[: len(watch.ahead)] = torch.tensor(watch.ahead)
        return R


def _part_of(report: Report, index: int, count: int) -> Report:
    """Reports one of several fits as a part of them all."""
    return lambda where, share: report(f"{index + 1} of {count}: {where}", (index + share) / count)


class _Watch(pl.Callback):
    """Says where a run is, and notes what a record needs besides the scores on tasks learned."""

    def __init__(self, run: Run, seed: int, report: Report, ceilings: list[float] | None) -> None:
        self.method = METHODS[run.method].make(**run.settings)
        self.curves = ForgettingCurves(run.protocol.metric, ceilings=ceilings)
        self.seconds = 0.0
        self.used_capacity: list[float] = []
        self.at_first: list[float] = []  # of each task, before any training
        self.ahead: list[float] = []  # of each task but the first, right before it is learned
        self.points: dict[str, list[list[float]]] = {}
        self._label = " ".join([*run.label, f"seed={seed}"])
        self._epochs = run.protocol.epochs
        self._follows = isinstance(run.protocol, Games)
        self._report = report
        self._begun = 0.0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begun = time.perf_counter() - self.seconds
        module = cast(Classifier, pl_module)
        if trainer.datamodule and not self.at_first and not isinstance(module.head, TaskHeads):  # type: ignore[attr-defined]
            self.at_first = [accuracy(module, task) for task in sequence(trainer).tasks]

    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        tasks = sequence(trainer).tasks
        if not all(theta.isfinite().all() for theta in pl_module.parameters()):
            raise FloatingPointError(f"The weights are not finite after {task}")
        if self.at_first and task.index + 1 < len(tasks):
            self.ahead.append(accuracy(cast(Classifier, pl_module), tasks[task.index + 1]))
        if isinstance(self.method, BLIP):
            self.used_capacity.append(round(self.method.used_capacity, 6))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds = time.perf_counter() - self._begun
        epoch, epochs = trainer.current_epoch, trainer.fit_loop.max_epochs or 1
        mean = average_score(self.curves.matrix)
        self._report(
            f"{self._label}: task {epoch // self._epochs + 1} of {epochs // self._epochs}, "
            f"epoch {epoch % self._epochs + 1} of {self._epochs}, {self.seconds:.0f} s"
            + (f", mean score {100 * float(mean):.2f} %" if mean.isfinite() else ""),
            (epoch + 1) / epochs,
        )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._follows:
            for score in self.curves.record(trainer).scores:
                points = self.points.setdefault(score.task, [])
                points.append([round(score.position, 4), round(100 * score.score, 2)])

    def state_dict(self) -> dict[str, Any]:
        names = ("seconds", "used_capacity", "at_first", "ahead")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in state_dict.items():
            setattr(self, name, value)


def _saves(path: Path, epochs: int) -> ModelCheckpoint:
    """Saves all that is needed to go on after so many epochs, always in the same file."""
    return ModelCheckpoint(
        path.parent,
        filename=path.stem,
        every_n_epochs=epochs,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )


def _percent(share: Tensor) -> float | None:
    return None if share.isnan() else round(100 * float(share), 4)


def summary(run: Run, records: Sequence[Record]) -> str:
    """ACC and BWT of all seeds in one line: mean ± standard deviation of the sample."""
    seconds = statistics.mean(record.seconds for record in records)
    figures = [f"ACC {spread([record.ACC for record in records])} %"]
    transfers = [record.BWT for record in records if record.BWT is not None]
    if transfers:
        figures.append(f"BWT {spread(transfers, '+')} % (over T - 1)")
    return f"{', '.join(run.label)}, {len(records)} seeds: {', '.join(figures)}, {seconds:.0f} s a seed"


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean ± standard deviation of the sample, the latter of more than one value.

    Example:
        >>> spread([1.0, 3.0]), spread([0.5], "+")
        ('2.00 ± 1.41', '+0.50')
    """
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
    parser.add_argument("stream", choices=STREAMS, metavar="STREAM", help=", ".join(STREAMS))
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with the data sets")
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


def _parser() -> argparse.ArgumentParser:
    streams = [f"  {name:26}{protocol.description}" for name, protocol in STREAMS.items()]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__,
        epilog="\n".join(["streams:", *streams]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--seeds", type=int, default=3, help="how many: 0, 1, …")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs every seed that has no record yet, and prints the mean over all."""
    run, options = parse_run(_parser(), arguments)
    records = [run.record(options.data, options.out, seed, options.device) for seed in range(options.seeds)]
    print(summary(run, records))


if __name__ == "__main__":
    main()
