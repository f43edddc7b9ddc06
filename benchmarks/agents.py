"""The weights of an agent after each task, in files beside the record of its run."""

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
    """Write the agent's weights at the end of each task, as ``<stem>-after<index>.pt``.

    Place it after the method among the callbacks, so that the weights are those that the method leaves.

    Args:
        stem: The path of the run's record, without its suffix.
        games: The stream.
    """

    def __init__(self, stem: Path, games: Games) -> None:
        self.stem = stem
        self.games = games

    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: EnvTask) -> None:
        """Write the weights."""
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
    """Return the agents of a run.

    Args:
        folder: The output folder of ``benchmarks.run``.
        run: The name of the run's record, without its suffix; not needed if the folder has one run.

    Returns:
        The stream, and the agent after each learned task.

    Raises:
        ValueError: If there is no such run, or there are several and none is named.

    Example:
        >>> read_agents(Path("nowhere"))
        Traceback (most recent call last):
        ValueError: run=None must be one of [], the runs with agents in nowhere: ...
    """
    runs = sorted({path.name.rpartition("-after")[0] for path in folder.glob("*-after*.pt")})
    if run is None and len(runs) == 1:
        (run,) = runs
    if run not in runs:
        raise ValueError(
            f"run={run} must be one of {runs}, the runs with agents in {folder}: name one of them, or learn "
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
