"""One method on one stream: a run, which learns the stream and keeps a record of each seed."""

from __future__ import annotations

import statistics
import tempfile
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
from benchmarks.machine import machine
from benchmarks.memory import held_bytes
from benchmarks.methods import METHODS
from benchmarks.networks import Classifier
from benchmarks.ppo import PPO
from benchmarks.protocols import PROTOCOLS, Protocol
from benchmarks.record import Record
from benchmarks.scoring import accuracy
from benchmarks.trainer import quiet_trainer
from benchmarks.watch import Report, Watch, part_of, print_report
from lightning_blip import EnvSequence, TaskSequenceDataModule
from lightning_blip.baselines import JointTraining
from lightning_blip.metrics import average_score, backward_transfer, forward_transfer

#: By name: streams of data sets, and of environments.
STREAMS: dict[str, Protocol | Games] = {**PROTOCOLS, **GAMES}


@dataclass(frozen=True)
class Run:
    """One method with its settings on one stream.

    Attributes:
        protocol: The stream.
        method: The name of the method.
        settings: Arguments of the method; the defaults of all others hold.
    """

    protocol: Protocol | Games
    method: str
    settings: dict[str, Any]

    @property
    def label(self) -> list[str]:
        """What distinguishes the run from others: stream, method, settings, and an unusual length."""
        usual = STREAMS[self.protocol.name]
        given = dict(sorted(self.settings.items()))
        for name in ("tasks", "epochs"):
            if getattr(self.protocol, name) != getattr(usual, name):
                given[name] = getattr(self.protocol, name)
        return [self.protocol.name, self.method, *(f"{name}={value}" for name, value in given.items())]

    def path(self, folder: Path, seed: int) -> Path:
        """Return the file of the record of a seed."""
        label = "-".join(quote(part, safe="=") for part in self.label)
        return folder / f"{label}-seed{seed}.json"

    def diverged(self, folder: Path, seed: int) -> Path:
        """Return the file that stands for the record of a seed that diverged."""
        return self.path(folder, seed).with_suffix(".diverged")

    def record(
        self, data: Path, out: Path, seed: int, device: str = "cpu", report: Report = print_report
    ) -> Record:
        """Return the record of a seed; learn the stream first if there is none yet.

        Args:
            data: The folder of the data.
            out: The folder of the records, and of the checkpoint that an interrupted run goes on from.
            seed: The seed of everything that is random.
            device: ``"cpu"`` or ``"cuda"``.
            report: Called after each epoch.

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

    def learn(
        self,
        data: Path,
        seed: int,
        device: str = "cpu",
        report: Report = print_report,
        unfinished: Path | None = None,
        ceilings: list[float] | None = None,
    ) -> Record:
        """Learn the whole stream in one fit.

        The initial parameters of the network, the tasks and the order of their samples depend on the seed
        alone, whatever the method.

        Args:
            data: The folder of the data.
            seed: The seed of everything that is random.
            device: ``"cpu"`` or ``"cuda"``.
            report: Called after each epoch.
            unfinished: The checkpoint, written after each task, or after each epoch of a game; if it exists,
                the run goes on from it.
            ceilings: The score of each task that counts as 100 %, if the stream does not define it.

        Returns:
            The record.
        """
        if self.method == "single":
            return self._learn_alone(data, seed, device, report)
        pl.seed_everything(seed, verbose=False)
        stream = self.protocol.stream(data, seed)
        module = self.protocol.module()
        ceilings = self.protocol.ceilings or ceilings
        label = " ".join([*self.label, f"seed={seed}"])
        watch = Watch(self.protocol, label, METHODS[self.method].make(**self.settings), report, ceilings)
        if self.method == "joint":
            R = self._learn_jointly(module, cast(TaskSequenceDataModule, stream), watch, device)
        else:
            R = self._learn_in_sequence(module, stream, watch, device, unfinished)
        return self._recorded(R, module, watch, seed, device, ceilings)

    def _recorded(
        self,
        R: Tensor,
        module: Classifier | PPO,
        watch: Watch,
        seed: int,
        device: str,
        ceilings: list[float] | None,
    ) -> Record:
        parameters = sum(theta.numel() for theta in module.parameters())
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
            bytes_per_parameter=round(held_bytes(watch.method, module) / parameters, 2),
            seconds=round(watch.seconds, 3),
            machine=machine(device),
            torch_version=torch.__version__,
            ceilings=ceilings,
            curves=watch.points,
        )

    def _ceilings(self, data: Path, out: Path, seed: int, device: str, report: Report) -> list[float] | None:
        """Return the return of a single-task run in each game whose best return is unknown."""
        games = self.protocol
        if not isinstance(games, Games) or games.ceilings or self.method == "single":
            return None
        whole = replace(games, tasks=STREAMS[games.name].tasks)
        single = Run(whole, "single", {}).record(data, out, seed, device, report)
        assert single.ceilings is not None
        return single.ceilings[: games.tasks]

    def _learn_alone(self, data: Path, seed: int, device: str, report: Report) -> Record:
        """Learn each game with a separate agent, and return one record of them all."""
        games = cast(Games, self.protocol)
        records = [
            Run(game, "finetune", {}).learn(data, seed, device, part_of(report, index, games.tasks))
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

    def _learn_jointly(
        self, module: Classifier | PPO, stream: TaskSequenceDataModule, watch: Watch, device: str
    ) -> Tensor:
        """Learn all tasks at once, and return R, of which only the last row is known."""
        trainer = quiet_trainer(
            [watch], accelerator=device, max_epochs=self.protocol.epochs, limit_val_batches=0
        )
        trainer.fit(module, datamodule=JointTraining(stream))
        R = torch.full((len(stream), len(stream)), torch.nan)
        R[-1] = torch.tensor([accuracy(cast(Classifier, module), task) for task in stream.tasks])
        return R

    def _learn_in_sequence(
        self,
        module: Classifier | PPO,
        stream: TaskSequenceDataModule | EnvSequence,
        watch: Watch,
        device: str,
        unfinished: Path | None,
    ) -> Tensor:
        """Learn task after task, and return R."""
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


def _saves(path: Path, epochs: int) -> ModelCheckpoint:
    """Return a callback that overwrites one checkpoint each time this many epochs have passed."""
    return ModelCheckpoint(
        path.parent,
        filename=path.stem,
        every_n_epochs=epochs,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )


def _percent(share: Tensor) -> float | None:
    return None if share.isnan() else round(100 * float(share), 4)
