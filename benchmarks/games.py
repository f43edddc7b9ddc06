"""The streams of reinforcement learning: their environments, agents and lengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.wrappers import TransformObservation
from torch import Tensor, nn

from benchmarks.ppo import PPO
from lightning_blip import EnvSequence


@dataclass(frozen=True)
class Games:
    """A stream of environments and how it is learned, the counterpart of ``Protocol``.

    Attributes:
        name: The name of the stream.
        description: One line of text.
        environments: Ids of environments, or functions of a ``render_mode`` that make them, by name of task.
        actions: The number of actions of each environment.
        body: Makes the network without its heads; returns it with its number of features.
        agent: Arguments of PPO.
        options: Arguments of ``EnvSequence`` except the number of steps.
        tasks: The number of tasks.
        epochs: The number of epochs per task.
        source: The publication with these settings.
        best: The return that counts as 100 %; 100 to show the returns themselves, None for the return of a
            single-task run.
        validate_every: The number of epochs from one evaluation on all learned games to the next.
        metric: The score that the agent logs in validation.
    """

    name: str
    description: str
    environments: Mapping[str, Any]
    actions: tuple[int, ...]
    body: Callable[[], tuple[nn.Module, int]]
    agent: Mapping[str, Any]
    options: Mapping[str, int]
    tasks: int
    epochs: int
    source: str
    best: float | None
    validate_every: int
    metric: str = "val_return"

    @property
    def batch_size(self) -> int:
        """The batch size in training."""
        return self.options["batch_size"]

    @property
    def save_every(self) -> int:
        """The number of epochs from one checkpoint to the next: 1, since an epoch may take long."""
        return 1

    @property
    def ceilings(self) -> list[float] | None:
        """The return of each task that counts as 100 %; None if it is that of a single-task run."""
        return None if self.best is None else [self.best] * self.tasks

    @property
    def steps_per_epoch(self) -> int:
        """The number of steps per epoch, over all environments."""
        return self.options["num_envs"] * self.options["rollout_steps"] * self.options["updates_per_epoch"]

    def stream(self, folder: Path, seed: int) -> EnvSequence:
        """Return the environments as a data module.

        Args:
            folder: Not used.
            seed: The seed of the environments and of the order of their samples.

        Returns:
            The data module.

        Raises:
            ValueError: If the stream has fewer tasks.
        """
        if self.tasks > len(self.environments):
            raise ValueError(f"tasks={self.tasks} is more than the {len(self.environments)} of {self.name}")
        names = list(self.environments)[: self.tasks]
        return EnvSequence(
            [self.environments[name] for name in names],
            steps_per_task=self.epochs * self.steps_per_epoch,
            names=names,
            seed=seed,
            **self.options,
        )

    def alone(self) -> list[Games]:
        """Return one stream per environment."""
        games = zip(self.environments.items(), self.actions, strict=True)
        streams = [
            replace(self, environments=dict([game]), actions=(count,), tasks=1) for game, count in games
        ]
        return streams[: self.tasks]

    def module(self) -> PPO:
        """Return the agent, its parameters drawn from torch's global random numbers."""
        return PPO(*self.body(), self.actions[: self.tasks], **self.agent)

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process looks the functions up by the name of the stream.
        return _of_length, (self.name, self.tasks, self.epochs)


def _of_length(name: str, tasks: int, epochs: int) -> Games:
    return replace(GAMES[name], tasks=tasks, epochs=epochs)


def cartpole(render_mode: str | None = None, **physics: float) -> gymnasium.Env[Any, Any]:
    """Return CartPole-v1 with other physics, such as ``gravity``, ``length`` or ``force_mag``."""
    environment = gymnasium.make("CartPole-v1", render_mode=render_mode)
    cart: Any = environment.unwrapped
    for name, value in physics.items():
        setattr(cart, name, value)
    cart.polemass_length = cart.masspole * cart.length
    return environment


# The largest number of channels of a game of MinAtar.
_CHANNELS = 10


@cache
def _know_minatar() -> None:
    """Register the ids of MinAtar, only when a game is played: the import takes a second."""
    from minatar.gym import register_envs

    register_envs()


def minatar(game: str, render_mode: str | None = None) -> gymnasium.Env[Any, Any]:
    """Return a game of MinAtar with ten channels, which come first, cut after 2,500 steps as Freeway is."""
    _know_minatar()
    environment = gymnasium.make(
        f"MinAtar/{game}-v1", max_episode_steps=2_500, disable_env_checker=True, render_mode=render_mode
    )
    space = gymnasium.spaces.Box(0, 1, (_CHANNELS, 10, 10), np.uint8)
    return TransformObservation(environment, _channels_first, space)


def _channels_first(cells: Any) -> Any:
    filled = np.zeros((_CHANNELS, 10, 10), np.uint8)
    filled[: cells.shape[-1]] = cells.transpose(2, 0, 1)
    return filled


def _tanh_mlp() -> tuple[nn.Module, int]:
    return nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()), 64


class _Bytes(nn.Module):
    """Scale values from [0, ``most``] to [0, 1]."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def forward(self, x: Tensor) -> Tensor:
        return x / self.most


def _minatar_network() -> tuple[nn.Module, int]:
    convolution, hidden = nn.Conv2d(_CHANNELS, 16, 3), nn.Linear(16 * 8 * 8, 128)
    return nn.Sequential(_Bytes(1), convolution, nn.ReLU(), nn.Flatten(), hidden, nn.ReLU()), 128


def _atari_network() -> tuple[nn.Module, int]:
    layers: list[nn.Module] = [_Bytes(255)]
    for inputs, outputs, kernel, stride in ((4, 32, 8, 4), (32, 64, 4, 2), (64, 128, 3, 1)):
        layers += [nn.Conv2d(inputs, outputs, kernel, stride), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 7 * 7, 1024), nn.ReLU()), 1024


# The games of the paper in its order, with their numbers of actions.
_ATARI = {"KungFuMaster": 14, "Boxing": 18, "Jamesbond": 18, "Krull": 18, "Riverraid": 18, "SpaceInvaders": 6}

# With the number of actions that have an effect.
_MINATAR = {"Breakout": 3, "Asterix": 5, "Freeway": 3, "SpaceInvaders": 4}

GAMES = {
    games.name: games
    for games in (
        Games(
            "cartpole",
            "CartPole with a long pole and double gravity, the same with reversed force, and with a short "
            "pole and half the gravity, a head per task, MLP 4-64-64, PPO, 41,000 steps per task",
            environments={
                "heavy": partial(cartpole, length=2.0, gravity=20.0),
                "reversed": partial(cartpole, length=2.0, gravity=20.0, force_mag=-10.0),
                "light": partial(cartpole, length=0.25, gravity=5.0),
            },
            actions=(2, 2, 2),
            body=_tanh_mlp,
            agent={"lr": 1e-3, "clip": 0.2, "entropy_weight": 0.0, "reward_scale": 0.05},
            options={
                "num_envs": 8,
                "rollout_steps": 128,
                "updates_per_epoch": 10,
                "passes": 10,
                "batch_size": 256,
                "episodes": 20,
            },
            tasks=3,
            epochs=4,
            source="our choice",
            best=500.0,
            validate_every=1,
        ),
        Games(
            "minatar",
            "Breakout, Asterix, Freeway and Space Invaders of MinAtar, a head per task, a convolution of "
            "16 channels and 128 hidden units, PPO, 0.5 M steps per game",
            environments={game: partial(minatar, game) for game in _MINATAR},
            actions=tuple(_MINATAR.values()),
            body=_minatar_network,
            agent={"lr": 3e-3, "clip": 0.2},
            options={
                "num_envs": 64,
                "rollout_steps": 64,
                "updates_per_epoch": 12,
                "passes": 4,
                "batch_size": 512,
                "episodes": 20,
            },
            tasks=4,
            epochs=10,
            source="network: Young and Tian, arXiv 1903.03176; the rest is our choice",
            best=None,
            validate_every=2,
        ),
        Games(
            "atari6",
            "KungFuMaster, Boxing, Jamesbond, Krull, Riverraid and SpaceInvaders, a head per task, "
            "three convolutions and 1,024 hidden units, PPO, 10 M steps per game",
            environments={name: f"ALE/{name}-v5" for name in _ATARI},
            actions=tuple(_ATARI.values()),
            body=_atari_network,
            agent={},
            options={
                "num_envs": 16,
                "rollout_steps": 125,
                "updates_per_epoch": 10,
                "passes": 4,
                "batch_size": 250,
                "episodes": 10,
            },
            tasks=6,
            epochs=500,
            source="the paper: games, network, PPO and its settings, except that the critic's loss is not "
            "clipped",
            best=100.0,
            validate_every=50,
        ),
    )
}
