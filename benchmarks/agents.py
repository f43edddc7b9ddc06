"""What an agent was after each task, in files beside the record of its run."""

from __future__ import annotations

from dataclasses import replace
from glob import escape
from pathlib import Path
from typing import cast

import pytorch_lightning as pl
import torch

from benchmarks.games import GAMES, Games
from benchmarks.ppo import PPO
from lightning_blip import EnvSequence
from lightning_blip.tasks.environments import EnvTask
from lightning_blip.tasks.sequence import sequence


class KeepAgents(pl.Callback):
    """Writes the agent's weights at each task's end, as ``<stem>-after<index>.pt``.

    It comes after the method, so that they are what the method leaves.

    Args:
        stem: Path of the run's record, without its suffix.
        games: What is learned.
    """

    def __init__(self, stem: Path, games: Games) -> None:
        self.stem = stem
        self.games = games

    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: EnvTask) -> None:
        """Writes them."""
        self.stem.parent.mkdir(parents=True, exist_ok=True)
        torch.save(
            {
                "stream": self.games.name,
                "tasks": self.games.tasks,
                "seed": cast(EnvSequence, sequence(trainer)).seed,
                "weights": pl_module.state_dict(),
            },
            self.stem.with_name(f"{self.stem.name}-after{task.index}.pt"),
        )


def read_agents(folder: Path, run: str | None = None) -> tuple[EnvSequence, list[PPO]]:
    """The agents that a run kept.

    Args:
        folder: Where ``benchmarks.run`` left them.
        run: The name of the run's record, without its suffix; may be left out where there is one run.

    Returns:
        The stream, and the agent as it was after each task that was learned.

    Raises:
        ValueError: If there is no such run, or there are several and none is named.

    Example:
        >>> read_agents(Path("nowhere"))
        Traceback (most recent call last):
        ValueError: run=None must be one of [], those that nowhere has agents of: ...
    """
    runs = sorted({path.name.rpartition("-after")[0] for path in folder.glob("*-after*.pt")})
    if run is None and len(runs) == 1:
        (run,) = runs
    if run not in runs:
        raise ValueError(
            f"run={run} must be one of {runs}, those that {folder} has agents of: name one of them, or learn "
            f"a stream of games with python -m benchmarks.run STREAM --method METHOD --out {folder}"
        )
    count = len(list(folder.glob(f"{escape(run)}-after*.pt")))
    kept = [
        torch.load(folder / f"{run}-after{index}.pt", map_location="cpu", weights_only=True)
        for index in range(count)
    ]
    games = replace(GAMES[kept[0]["stream"]], tasks=kept[0]["tasks"])
    agents = [games.module().eval() for _ in kept]
    for agent, one in zip(agents, kept, strict=True):
        agent.load_state_dict(one["weights"])
    return games.stream(folder, kept[0]["seed"]), agents
