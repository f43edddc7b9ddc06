"""Acting in environments: rollouts for training, and whole episodes for evaluation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


class Agent(Protocol):
    """The methods that a LightningModule needs to learn from environments."""

    def act(self, observations: Tensor, explore: bool) -> dict[str, Tensor]:
        """Return the next actions.

        Args:
            observations: (N, …), one per environment.
            explore: Whether to sample from the policy, or to take its best action.

        Returns:
            ``"actions"`` (N, …), and under other names whatever learning needs of each step.
        """

    def targets(self, rollout: Rollout) -> dict[str, Tensor]:
        """Return what the training batches hold besides observations, such as advantages: (T, N, …) each."""


@dataclass
class Rollout:
    """The experience of N environments in T steps.

    Attributes:
        observations: The observations before each step, (T, N, …).
        decisions: The results of the agent's ``act``, (T, N, …) each, with ``"actions"`` among them.
        rewards: (T, N).
        ended: Whether the episode ended with the step, by itself or because its time was up, (T, N).
        following: The observations after the last step, (N, …).
        cut: The step and environment of the episodes whose time was up, (M, 2).
        after_cut: The last observations of those episodes, (M, …).
    """

    observations: Tensor
    decisions: dict[str, Tensor]
    rewards: Tensor
    ended: Tensor
    following: Tensor
    cut: Tensor
    after_cut: Tensor


class Episodes:
    """The only batch of an environment in validation and test: episodes that the module's own step plays.

    Args:
        environment: The environment's id, or a function that makes it.
        count: The number of episodes, played side by side.
        seed: The seed of the first environment; the others count up from it. The episodes are the same each
            time.
    """

    def __init__(self, environment: Any, count: int, seed: int) -> None:
        self.environment = environment
        self.count = count
        self.seed = seed

    @torch.no_grad()
    def play(self, agent: Any) -> Tensor:
        """Play the episodes with the agent's best actions.

        Args:
            agent: A module with ``act``, see :class:`Agent`.

        Returns:
            The sum of the rewards of each episode, (count,).
        """
        returns, running = torch.zeros(self.count), torch.ones(self.count, dtype=torch.bool)
        with closing(Players(self.environment, self.count, self.seed, agent.device, True)) as players:
            while running.any():
                step = players.step(agent.act(players.observations, explore=False)["actions"])
                returns += torch.where(running, step.rewards, 0.0)
                running &= ~step.ended
        return returns


@dataclass
class _Step:
    rewards: Tensor
    ended: Tensor
    cut: list[tuple[int, Any]]


class Players:
    """Environments side by side, each reset as soon as its episode ends.

    Args:
        environment: The environment's id, or a function that makes it.
        count: The number of environments.
        seed: The seed of the first environment; the others count up from it.
        device: The device of the observations.
        evaluation: Whether rewards are kept as they are, instead of clipped as Atari's are in training.
    """

    def __init__(
        self, environment: Any, count: int, seed: int, device: torch.device, evaluation: bool = False
    ) -> None:
        self._envs = vector_environment(environment, count, evaluation)
        self._device = device
        self.observations = self._tensor(self._envs.reset(seed=seed)[0])

    def step(self, actions: Tensor) -> _Step:
        """Take one action in each environment."""
        from gymnasium.spaces import Box

        space, taken = self._envs.single_action_space, actions.cpu().numpy()
        if isinstance(space, Box):
            taken = np.clip(taken, space.low, space.high)
        observations, rewards, terminated, truncated, infos = self._envs.step(taken)
        self.observations = self._tensor(observations)
        cut = [(int(env), infos["final_obs"][env]) for env in np.flatnonzero(truncated & ~terminated)]
        return _Step(
            torch.as_tensor(rewards, dtype=torch.float32), torch.as_tensor(terminated | truncated), cut
        )

    @torch.no_grad()
    def roll(self, decide: Callable[[Tensor], dict[str, Tensor]], steps: int) -> Rollout:
        """Take several steps, and return what was seen and decided."""
        observations, decisions, taken = [], [], []
        for _ in range(steps):
            observations.append(self.observations)
            decisions.append(decide(self.observations))
            taken.append(self.step(decisions[-1]["actions"]))
        cut = [(time, env, last) for time, step in enumerate(taken) for env, last in step.cut]
        return Rollout(
            torch.stack(observations),
            {name: torch.stack([one[name] for one in decisions]) for name in decisions[0]},
            torch.stack([step.rewards for step in taken]).to(self._device),
            torch.stack([step.ended for step in taken]).to(self._device),
            self.observations,
            torch.tensor([(time, env) for time, env, _ in cut], dtype=torch.int64).view(-1, 2),
            self._tensor(np.stack([last for _, _, last in cut])) if cut else self.observations[:0],
        )

    def close(self) -> None:
        """Close the environments."""
        self._envs.close()

    def _tensor(self, observations: Any) -> Tensor:
        observations = np.asarray(observations)
        if observations.dtype == np.float64:
            observations = observations.astype(np.float32)
        return torch.tensor(observations, device=self._device)


def vector_environment(environment: Any, count: int, evaluation: bool) -> Any:
    """Make several copies of an environment that are stepped together.

    Args:
        environment: The environment's id, or a function that makes it.
        count: The number of copies.
        evaluation: Whether rewards are kept as they are, instead of clipped as Atari's are in training.

    Returns:
        Gymnasium's vector environment.

    Raises:
        ImportError: If Gymnasium is not installed.
    """
    try:
        import gymnasium
    except ImportError as error:
        raise ImportError(
            "EnvSequence needs Gymnasium, which is not installed: pip install 'lightning-blip[rl]'"
        ) from error
    same_step = gymnasium.vector.AutoresetMode.SAME_STEP
    if isinstance(environment, str) and environment.startswith("ALE/"):
        import ale_py  # noqa: F401

        return gymnasium.make_vec(
            environment, count, autoreset_mode=same_step, reward_clipping=not evaluation
        )
    make = environment if callable(environment) else partial(gymnasium.make, environment)
    return gymnasium.vector.SyncVectorEnv([make] * count, autoreset_mode=same_step)
