"""A film of agents at play: a grid of games (columns) and of the tasks after which they are played (rows)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode
from matplotlib.animation import FFMpegWriter, PillowWriter
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.ppo import PPO
from lightning_blip import EnvSequence
from lightning_blip.tasks.heads import task_heads
from lightning_blip.tasks.rollouts import Episodes

# Larger screens are reduced: a cell of the film has fewer rows.
_MOST_ROWS = 200


class Scene(NamedTuple):
    """An episode: the sum of its rewards, and the screens of its first steps."""

    paid: float
    screens: list[Any]


def play(agent: PPO, stream: EnvSequence, task: int, steps: int) -> Scene:
    """Play the first episode of those that a task is evaluated on.

    Args:
        agent: The agent.
        stream: The stream that it learned.
        task: The index of the task.
        steps: The largest number of steps to show.

    Returns:
        The episode.
    """
    for heads in task_heads(agent):
        heads.active = task
    (evaluation,) = stream.test_dataloader()[task]
    player = _Player(agent)
    paid = Episodes(evaluation.environment, 1, evaluation.seed).play(player)
    return Scene(paid.item(), _screens(evaluation.environment, evaluation.seed, player.actions[:steps]))


class _Player:
    """An agent that collects its actions."""

    def __init__(self, agent: PPO) -> None:
        self.agent = agent
        self.device = agent.device
        self.actions: list[int] = []

    def act(self, observations: Tensor, explore: bool) -> dict[str, Tensor]:
        decisions = self.agent.act(observations, explore)
        self.actions.append(int(decisions["actions"]))
        return decisions


def _screens(environment: Any, seed: int, actions: Sequence[int]) -> list[Any]:
    """Return the screens before each action, by playing the same episode again in colour."""
    if isinstance(environment, str) and environment.startswith("ALE/"):
        # The same emulator that the agent played: another one would draw other random numbers.
        colours: Any = {"grayscale": False, "img_height": 210, "img_width": 160, "stack_num": 1}
        same_step = AutoresetMode.SAME_STEP
        envs = gymnasium.make_vec(environment, 1, autoreset_mode=same_step, **colours)
        screens = [envs.reset(seed=seed)[0]]
        screens += [envs.step(np.array([action]))[0] for action in actions[:-1]]
        envs.close()
        return [screen[0, 0] for screen in screens]
    if isinstance(environment, str):
        env = gymnasium.make(environment, render_mode="rgb_array")
    else:
        env = environment(render_mode="rgb_array")
    env.reset(seed=seed)
    screens = []
    for action in actions:
        screen: Any = env.render()
        every = -(-len(screen) // _MOST_ROWS)
        screens.append(screen[::every, ::every])
        env.step(action)
    env.close()
    return screens


def draw(names: Sequence[str], rows: Sequence[Sequence[Scene]], path: Path, fps: int) -> None:
    """Draw the film, one frame per step; an episode that has ended shows its last screen.

    Args:
        names: The names of the games.
        rows: For each task, the scenes after it of the games learned by then.
        path: The film, ``.gif`` or ``.mp4``.
        fps: Frames per second.
    """
    figure = Figure(figsize=(1.8 * len(names) + 0.4, 2.2 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(names), squeeze=False)
    pictures = []
    for name, column in zip(names, axes.T, strict=True):
        column[0].set_title(name, fontsize=10)
        for axis in column:
            axis.axis("off")
    for name, row, scenes in zip(names, axes, rows, strict=False):
        row[0].set_ylabel(f"after {name}")
        for axis, scene in zip(row, scenes, strict=False):
            axis.axis("on")
            axis.set(xticks=[], yticks=[], xlabel=f"{scene.paid:,.0f}", anchor="N")
            pictures.append((axis.imshow(scene.screens[0]), scene.screens))
    # All frames have the layout of the first.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    writer = FFMpegWriter(fps) if path.suffix == ".mp4" else PillowWriter(fps)
    with writer.saving(figure, path, dpi=100):
        for step in range(max(len(screens) for _, screens in pictures)):
            for picture, screens in pictures:
                picture.set_data(screens[min(step, len(screens) - 1)])
            writer.grab_frame()
