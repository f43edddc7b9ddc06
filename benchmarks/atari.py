"""Measure how fast Atari's games are played and learned, or draw a film of the agents of a run."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import ale_py  # noqa: F401
import gymnasium
import pytorch_lightning as pl
from gymnasium.vector import AutoresetMode
from matplotlib.animation import FFMpegWriter

from benchmarks.agents import read_agents
from benchmarks.film import draw, play
from benchmarks.games import GAMES, Games
from benchmarks.machine import machine
from benchmarks.trainer import quiet_trainer
from lightning_blip import BLIP, EnvSequence
from lightning_blip.tasks.environments import EnvTask
from lightning_blip.tasks.sequence import sequence

_ATARI = GAMES["atari6"]


def speed(names: Sequence[str], steps: int, precision: Any = "32-true") -> list[str]:
    """Measure the paper's setting: 16 environments, rollouts of 125 steps, its network, PPO and BLIP.

    A step is four frames of the emulator and a forward pass of 32 MFLOP, in which the agent acts. Training
    passes over each step four times, forward and backward, which costs as much as 13 forward passes per step,
    0.42 GFLOP: 1,500 steps per second would be 0.63 TFLOP per second.

    Args:
        names: The names of the games.
        steps: The number of steps per game and measurement, over all environments, at least 16.
        precision: The precision of the Trainer.

    Returns:
        One line each for the emulators alone with random actions, for rollouts, in which the agent acts, and
        for whole training, with rollouts and without evaluation and boundaries. Each starts after a first
        rollout, since creating a task's environments takes a second.
    """
    games = short(names, steps)
    alone = {name: _emulators(games, name) for name in names}
    watch = _Stopwatch()
    longer = {**games.options, "updates_per_epoch": games.options["updates_per_epoch"] + 1}
    begun = replace(games, options=longer)
    # Without evaluation, whose duration depends on the length of the episodes.
    trainer = quiet_trainer([watch, BLIP()], num_sanity_val_steps=0, limit_val_batches=0, precision=precision)
    trainer.fit(begun.module(), datamodule=begun.stream(Path(), seed=0))
    on = f"{machine()} of torch, {os.cpu_count()} of the emulators, {precision}"
    return [
        f"{what}: {_rates(seconds, games.steps_per_epoch)}; {on}"
        for what, seconds in (
            ("emulators alone, random actions", alone),
            ("rollouts, the agent acting", watch.rollouts),
            ("whole training", watch.training),
        )
    ]


def short(names: Sequence[str], steps: int) -> Games:
    """Return the paper's stream with these games only, and this many steps per game."""
    options = dict(_ATARI.options)
    options["rollout_steps"] = min(options["rollout_steps"], steps // options["num_envs"])
    options["updates_per_epoch"] = steps // (options["num_envs"] * options["rollout_steps"])
    actions = dict(zip(_ATARI.environments, _ATARI.actions, strict=True))
    return replace(
        _ATARI,
        environments={name: _ATARI.environments[name] for name in names},
        actions=tuple(actions[name] for name in names),
        options=options,
        tasks=len(names),
        epochs=1,
    )


def _emulators(games: Games, name: str) -> float:
    """Return the seconds that the emulators of a game take with random actions."""
    count = games.options["num_envs"]
    envs = gymnasium.make_vec(games.environments[name], count, autoreset_mode=AutoresetMode.SAME_STEP)
    envs.reset(seed=0)
    envs.action_space.seed(0)
    begun = time.perf_counter()
    for _ in range(games.steps_per_epoch // count):
        envs.step(envs.action_space.sample())
    seconds = time.perf_counter() - begun
    envs.close()
    return seconds


class _Stopwatch(pl.Callback):
    """Time the rollouts of each task, except its first: alone before the task, and with training in it."""

    def __init__(self) -> None:
        self.rollouts: dict[str, float] = {}
        self.training: dict[str, float] = {}
        self._begun = 0.0

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: EnvTask) -> None:
        observed = iter(sequence(trainer).task_dataloader())
        next(observed)
        begun = time.perf_counter()
        for _ in observed:
            pass
        self.rollouts[task.name] = time.perf_counter() - begun

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        tasks = cast(EnvSequence, sequence(trainer))
        of_a_rollout = int(trainer.num_training_batches) // tasks.updates_per_epoch
        if batch_idx == 0:
            self._begun = time.perf_counter()
        elif batch_idx == of_a_rollout * (tasks.updates_per_epoch - 1):  # the last rollout has just ended
            self.training[tasks.task.name] = time.perf_counter() - self._begun


def _rates(seconds: Mapping[str, float], steps: int) -> str:
    """Return the steps per second over all games, and of each game."""
    each = ", ".join(f"{name} {steps / taken:,.0f}" for name, taken in seconds.items())
    return f"{steps * len(seconds) / sum(seconds.values()):,.0f} environment steps per second ({each})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.atari", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    quick = commands.add_parser("speed", help="environment steps per second, on the CPU")
    games = list(_ATARI.environments)
    quick.add_argument("--games", nargs="+", choices=games, default=games, metavar="GAME", help=str(games))
    quick.add_argument("--steps", type=int, default=4_000, help="steps per game and measurement")
    quick.add_argument(
        "--precision", choices=("32-true", "bf16-mixed"), default="32-true", help="precision of the Trainer"
    )
    shown = commands.add_parser("render", help="a film of each game after each task")
    shown.add_argument("folder", type=Path, metavar="RUN_DIR", help="the --out folder of benchmarks.run")
    shown.add_argument("--run", help="name of a record without its suffix, if the folder has several")
    shown.add_argument("--out", type=Path, required=True, help="the film, .gif or .mp4")
    shown.add_argument("--seconds", type=float, default=10.0, help="the longest duration of the film")
    shown.add_argument("--fps", type=int, default=15, help="frames, and steps of the agent, per second")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the speeds, or draw the film."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command == "speed":
        if options.steps < _ATARI.options["num_envs"]:
            parser.error(
                f"--steps {options.steps} must be at least {_ATARI.options['num_envs']}, one per environment"
            )
        print("\n".join(speed(options.games, options.steps, options.precision)))
        return
    if options.out.suffix not in (".gif", ".mp4"):
        parser.error(f"--out {options.out} must end in .gif or .mp4")
    if options.out.suffix == ".mp4" and not FFMpegWriter.isAvailable():
        parser.error(f"--out {options.out} needs ffmpeg: apt-get install ffmpeg, or give a .gif")
    try:
        stream, agents = read_agents(options.folder, options.run)
    except ValueError as error:
        parser.error(str(error))
    steps = int(options.fps * options.seconds)
    rows = [
        [play(agent, stream, task, steps) for task in range(after + 1)] for after, agent in enumerate(agents)
    ]
    draw([task.name for task in stream.tasks], rows, options.out, options.fps)
    print(f"Wrote {options.out}")


if __name__ == "__main__":
    main()
