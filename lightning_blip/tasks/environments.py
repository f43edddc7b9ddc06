"""The data module that feeds a sequence of environments, one after another, within one fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_blip.tasks.sequence import TaskSequence, check_names
from lightning_blip.trainer import processes
from lightning_blip.trainer.classes import overrides
from lightning_blip.trainer.random_state import generator_of

if TYPE_CHECKING:
    from gymnasium import Space

# What a key is of, so that no two of a sequence are the same.
_TRAINING, _INFORMATION, _EVALUATION = range(3)


class Agent(Protocol):
    """What a LightningModule needs to learn from environments."""

    def act(self, observations: Tensor, explore: bool) -> dict[str, Tensor]:
        """What to do next.

        Args:
            observations: (N, …), one of each environment.
            explore: Whether to draw from the policy, or to do what it holds best.

        Returns:
            ``"actions"`` (N, …), and by other names whatever is to be kept of each step for learning.
        """

    def targets(self, rollout: Rollout) -> dict[str, Tensor]:
        """What the training batches hold beside the observations, (T, N, …) each, such as advantages."""


@dataclass(frozen=True)
class EnvTask:
    """One environment of a sequence.

    Attributes:
        name: How the task is called in logs, tables and pictures.
        environment: Its id, or what makes it.
        observation_space: Of one environment, preprocessed.
        action_space: Of one environment.
        index: The task's place in its sequence, from 0.
    """

    name: str
    environment: Any
    observation_space: Space[Any]
    action_space: Space[Any]
    index: int

    def __repr__(self) -> str:
        return f"EnvTask({self.name!r}, observations={self.observation_space}, actions={self.action_space})"


@dataclass
class Rollout:
    """What N environments went through in T steps.

    Attributes:
        observations: (T, N, …), those that were acted upon.
        decisions: What the agent's ``act`` gave, (T, N, …) each, ``"actions"`` among it.
        rewards: (T, N).
        ended: (T, N), whether the episode ended with the step, at its end or because its time was up.
        following: (N, …), the observations after the last step.
        cut: (M, 2), the step and environment of those episodes whose time was up.
        after_cut: (M, …), their last observations.
    """

    observations: Tensor
    decisions: dict[str, Tensor]
    rewards: Tensor
    ended: Tensor
    following: Tensor
    cut: Tensor
    after_cut: Tensor


class Episodes:
    """The one batch of an environment in validation and test: episodes to be played by the module's own step.

    Args:
        environment: Its id, or what makes it.
        count: How many episodes, side by side.
        seed: Of the first environment, those of the others counting up: the same episodes each time.
    """

    def __init__(self, environment: Any, count: int, seed: int) -> None:
        self.environment = environment
        self.count = count
        self.seed = seed

    @torch.no_grad()
    def play(self, agent: Any) -> Tensor:
        """Plays them as the agent holds best.

        Args:
            agent: A module with ``act``, see :class:`Agent`.

        Returns:
            (count,): the sum of each episode's rewards.
        """
        returns, running = torch.zeros(self.count), torch.ones(self.count, dtype=torch.bool)
        with closing(_Players(self.environment, self.count, self.seed, agent.device, True)) as players:
            while running.any():
                step = players.step(agent.act(players.observations, explore=False)["actions"])
                returns += torch.where(running, step.rewards, 0.0)
                running &= ~step.ended
        return returns


class EnvSequence(TaskSequence[EnvTask]):
    """Feeds environments one after another: one ``trainer.fit`` learns the whole sequence.

    It is to environments what :class:`TaskSequenceDataModule` is to data sets, and maps them to the Trainer's
    loops as follows, so that all that listens to the one works on the other.

    - A **batch** is a mini-batch ``(observations, targets)`` of a rollout, that is of ``rollout_steps`` steps
      of ``num_envs`` environments, made by the module's ``act``, with the targets that the module's
      ``targets`` made of it (see :class:`Agent`). Each rollout is gone through ``passes`` times, each time
      shuffled, then the next one is made: ``training_step`` is an ordinary one, in automatic optimization.
    - An **epoch** is ``updates_per_epoch`` rollouts. It begins with the environments reset, seeded by
      the task and the epoch: a fit that is resumed within an epoch resets them, too, and repeats the actions
      that were taken, so that any environment goes on where it was.
    - **Validation** has one loader for each environment seen so far, with one batch, :class:`Episodes`:
      ``validation_step(self, episodes, batch_idx, dataloader_idx=0)`` plays and logs them,
      ``self.log("val_return", episodes.play(self).mean(), batch_size=episodes.count)``.
    - **Test** and **prediction** have one for every environment, with ``test_step`` and ``predict_step``.
    - A task's **information** is measured on the observations of new rollouts, that the network makes as
      the task leaves it; nothing is kept for it. With logits of discrete actions as the output of
      ``forward(observations)``, its likelihood is BLIP's default.

    Atari's ids (``"ALE/Boxing-v5"``) are played by ale-py's own vector environment, with its preprocessing:
    four grey frames of 84x84, every fourth frame, rewards clipped in training and not in evaluation.

    Observations and actions are arrays (``Box``, ``Discrete``, ``MultiDiscrete`` or ``MultiBinary`` spaces).
    With several processes each plays environments of its own, and all of them the same episodes in
    evaluation.

    Args:
        environments: Ids that Gymnasium knows, or functions that make an environment, in the order of
            learning.
        steps_per_task: For how many steps, over all environments of a process, a task is learned: one number,
            or one a task; rounded up to whole epochs.
        num_envs: Environments side by side, of each process.
        rollout_steps: Steps of each of them in a rollout.
        updates_per_epoch: Rollouts an epoch.
        passes: How often a rollout is gone through.
        batch_size: Samples a batch, of each process.
        episodes: How many are played in evaluation.
        names: Of the tasks; their ids, or the functions' names, by default.
        seed: Of environments and the order of samples.

    Raises:
        ImportError: If Gymnasium is not there.
        ValueError: If there is no environment, two share a name, observations or actions are no arrays, or an
            argument is off. In a fit, if the module has no ``act`` or ``targets``; in prediction, if it has
            no ``predict_step``.

    Example:
        >>> tasks = EnvSequence(["CartPole-v1", "Acrobot-v1"], steps_per_task=50_000, num_envs=8)
        >>> tasks[1].name, tasks[1].action_space
        ('Acrobot-v1', Discrete(3))
    """

    def __init__(
        self,
        environments: Sequence[Any],
        *,
        steps_per_task: int | Sequence[int],
        num_envs: int = 16,
        rollout_steps: int = 125,
        updates_per_epoch: int = 10,
        passes: int = 4,
        batch_size: int = 250,
        episodes: int = 10,
        names: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        counts = {
            "num_envs": num_envs,
            "rollout_steps": rollout_steps,
            "updates_per_epoch": updates_per_epoch,
            "passes": passes,
            "batch_size": batch_size,
            "episodes": episodes,
        }
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name}={count} must be at least 1")
        tasks = _tasks(environments, names)
        steps = [steps_per_task] * len(tasks) if isinstance(steps_per_task, int) else list(steps_per_task)
        if len(steps) != len(tasks) or min(steps) < 1:
            raise ValueError(
                f"steps_per_task={steps_per_task} must be one number, or one for each of the {len(tasks)} "
                "environments, at least 1 each"
            )
        epoch = num_envs * rollout_steps * updates_per_epoch
        super().__init__(tasks, [-(-count // epoch) for count in steps], batch_size)
        self.num_envs = num_envs
        self.rollout_steps = rollout_steps
        self.updates_per_epoch = updates_per_epoch
        self.passes = passes
        self.episodes = episodes
        self.seed = seed

    @property
    def agent(self) -> Any:
        """The module that acts."""
        assert self.trainer is not None
        return self.trainer.lightning_module

    def setup(self, stage: str) -> None:
        """Puts the owner of the boundaries in its place, and finds out whether the module can act."""
        super().setup(stage)
        missing = [name for name in ("act", "targets") if not hasattr(self.agent, name)]
        if missing:
            raise ValueError(
                f"{type(self.agent).__name__} has no {' and no '.join(missing)}: define what "
                "lightning_blip.tasks.environments.Agent describes, so that EnvSequence can make rollouts"
            )
        if stage == "predict" and not overrides(self.agent, "predict_step"):
            raise ValueError(
                f"{type(self.agent).__name__} has no predict_step for Episodes: define "
                "predict_step(self, episodes, batch_idx, dataloader_idx=0), such as to return "
                "episodes.play(self)"
            )
        shapes = [task.observation_space.shape for task in self.tasks]
        if stage == "fit" and len(set(shapes)) > 1:
            rank_zero_warn(
                f"Observations have the shapes {shapes}: unless the module takes them all, give them one, by "
                "functions that make the environments in a wrapper, such as "
                "gymnasium.wrappers.TransformObservation"
            )

    def train_dataloader(self) -> Iterable[Any]:
        """The mini-batches of this epoch's rollouts."""
        return _EpochOfRollouts(self, self._key(_TRAINING, self.epoch, processes.rank_and_world_size()[0]))

    def task_dataloader(self) -> Iterable[Any]:
        """Observations and actions of new rollouts, as many as an epoch has."""
        return _Observed(self, self._key(_INFORMATION, processes.rank_and_world_size()[0]))

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """One loader for each environment seen so far, the current one last."""
        return [self._episodes(task) for task in self.tasks[: self.task.index + 1]]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """One loader for every environment, learned or not."""
        return [self._episodes(task) for task in self.tasks]

    predict_dataloader = test_dataloader

    def players(self, key: tuple[int, ...]) -> _Players:
        """The environments of the current task, seeded by a key."""
        return _Players(self.task.environment, self.num_envs, _seed(key), self.agent.device)

    def _key(self, *place: int) -> tuple[int, ...]:
        return (self.seed, self.task.index, *place)

    def _episodes(self, task: EnvTask) -> DataLoader[Any]:
        key = (self.seed, task.index, _EVALUATION)
        episodes = Episodes(task.environment, self.episodes, _seed(key))
        return DataLoader(cast(Any, [episodes]), batch_size=None, generator=generator_of(key))


class _EpochOfRollouts:
    """Makes rollouts and yields their mini-batches; goes on within its epoch after it was saved there."""

    def __init__(self, tasks: EnvSequence, key: tuple[int, ...]) -> None:
        self._tasks = tasks
        self._key = key
        self._state = _Progress()

    def __len__(self) -> int:
        return self._tasks.updates_per_epoch * self._batches_a_rollout

    def __iter__(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        tasks, done = self._tasks, self._state
        self._state = state = _Progress(given=done.given)
        with closing(tasks.players(self._key)) as players:
            for update in range(tasks.updates_per_epoch):
                if update < len(done.actions):
                    rollout = players.roll(_repeating(done.actions[update]), tasks.rollout_steps)
                    targets = done.targets
                    if update + 1 == len(done.actions):
                        _check_repeated(rollout, done.following, tasks.task)
                else:
                    rollout = players.roll(_acting(tasks), tasks.rollout_steps)
                    with _precision(tasks):
                        targets = tasks.agent.targets(rollout)
                state.actions.append(rollout.decisions["actions"].cpu())
                state.following, state.targets = rollout.following.cpu(), targets
                yield from self._batches(update, rollout, targets)

    def state_dict(self) -> dict[tuple[int, ...], dict[str, Any]]:
        """By the key of each process, the actions taken so far, and what was made of the last rollout."""
        done = self._state
        targets = {name: value.cpu() for name, value in done.targets.items()}
        saved = replace(done, actions=list(done.actions), targets=targets)
        return dict(processes.gathered((self._key, vars(saved))))

    def load_state_dict(self, state_dict: dict[tuple[int, ...], dict[str, Any]]) -> None:
        """Goes on where a loader of the same epoch and process was; one of another begins."""
        if self._key in state_dict:
            self._state = _Progress(**state_dict[self._key])

    @property
    def _batches_a_rollout(self) -> int:
        tasks = self._tasks
        return tasks.passes * -(-tasks.num_envs * tasks.rollout_steps // tasks.batch_size)

    def _batches(
        self, update: int, rollout: Rollout, targets: dict[str, Tensor]
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        observations = rollout.observations.flatten(0, 1)
        flat = {name: value.to(observations.device).flatten(0, 1) for name, value in targets.items()}
        place = update * self._batches_a_rollout
        for number in range(self._tasks.passes):
            order = torch.randperm(len(observations), generator=generator_of((*self._key, update, number)))
            for indices in order.to(observations.device).split(self._tasks.batch_size):
                place += 1
                if place > self._state.given:
                    self._state.given = place
                    yield observations[indices], {name: value[indices] for name, value in flat.items()}


@dataclass
class _Progress:
    """How far an epoch is: batches given, actions of each rollout, what the last one ended in and came to."""

    given: int = 0
    actions: list[Tensor] = field(default_factory=list)
    following: Tensor = field(default_factory=lambda: torch.zeros(0))
    targets: dict[str, Tensor] = field(default_factory=dict)


class _Observed:
    """Makes rollouts that nothing is learned from."""

    def __init__(self, tasks: EnvSequence, key: tuple[int, ...]) -> None:
        self._tasks = tasks
        self._key = key

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        with closing(self._tasks.players(self._key)) as players:
            for _ in range(self._tasks.updates_per_epoch):
                rollout = players.roll(_acting(self._tasks), self._tasks.rollout_steps)
                yield rollout.observations.flatten(0, 1), rollout.decisions["actions"].flatten(0, 1)


@dataclass
class _Step:
    rewards: Tensor
    ended: Tensor
    cut: list[tuple[int, Any]]


class _Players:
    """Environments side by side, each reset as soon as its episode ends, and what they show."""

    def __init__(
        self, environment: Any, count: int, seed: int, device: torch.device, evaluation: bool = False
    ) -> None:
        self._envs = _vector(environment, count, evaluation)
        self._device = device
        self.observations = self._tensor(self._envs.reset(seed=seed)[0])

    def step(self, actions: Tensor) -> _Step:
        """Does what an agent decided."""
        from gymnasium.spaces import Box

        space, doing = self._envs.single_action_space, actions.cpu().numpy()
        if isinstance(space, Box):
            doing = np.clip(doing, space.low, space.high)
        observations, rewards, terminated, truncated, infos = self._envs.step(doing)
        self.observations = self._tensor(observations)
        cut = [(int(env), infos["final_obs"][env]) for env in np.flatnonzero(truncated & ~terminated)]
        return _Step(
            torch.as_tensor(rewards, dtype=torch.float32), torch.as_tensor(terminated | truncated), cut
        )

    @torch.no_grad()
    def roll(self, decide: Callable[[Tensor], dict[str, Tensor]], steps: int) -> Rollout:
        """Goes on for some steps."""
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
        self._envs.close()

    def _tensor(self, observations: Any) -> Tensor:
        observations = np.asarray(observations)
        if observations.dtype == np.float64:
            observations = observations.astype(np.float32)
        return torch.tensor(observations, device=self._device)


def _acting(tasks: EnvSequence) -> Callable[[Tensor], dict[str, Tensor]]:
    def decide(observations: Tensor) -> dict[str, Tensor]:
        with _precision(tasks):
            decisions: dict[str, Tensor] = tasks.agent.act(observations, explore=True)
        return decisions

    return decide


def _precision(tasks: EnvSequence) -> AbstractContextManager[None]:
    """The Trainer's, as in its steps: probabilities of an older policy are compared with those of a newer."""
    assert tasks.trainer is not None
    context: AbstractContextManager[None] = tasks.trainer.precision_plugin.forward_context()
    return context


def _repeating(actions: Tensor) -> Callable[[Tensor], dict[str, Tensor]]:
    left = iter(actions)
    return lambda _observations: {"actions": next(left)}


def _check_repeated(rollout: Rollout, following: Tensor, task: EnvTask) -> None:
    if not torch.equal(rollout.following.cpu(), following):
        rank_zero_warn(
            f"{task} did not do again what it did before when its actions were repeated: the resumed fit "
            "goes on from where it is now"
        )


def _seed(key: tuple[int, ...]) -> int:
    return int(torch.randint(2**30, (), generator=generator_of(key)))


def _vector(environment: Any, count: int, evaluation: bool) -> Any:
    gymnasium = _gymnasium()
    same_step = gymnasium.vector.AutoresetMode.SAME_STEP
    if isinstance(environment, str) and environment.startswith("ALE/"):
        import ale_py  # noqa: F401

        options = {"autoreset_mode": same_step, "reward_clipping": not evaluation}
        return gymnasium.make_vec(environment, count, **options)
    make = environment if callable(environment) else partial(gymnasium.make, environment)
    return gymnasium.vector.SyncVectorEnv([make] * count, autoreset_mode=same_step)


def _gymnasium() -> Any:
    try:
        import gymnasium
    except ImportError as error:
        raise ImportError(
            "EnvSequence needs Gymnasium, which is not there: pip install 'lightning-blip[rl]'"
        ) from error
    return gymnasium


def _tasks(environments: Sequence[Any], names: Sequence[str] | None) -> list[EnvTask]:
    if names is None:
        names = [one if isinstance(one, str) else getattr(one, "__name__", repr(one)) for one in environments]
    if len(names) != len(environments):
        raise ValueError(f"names={list(names)} must be one for each of the {len(environments)} environments")
    check_names(names)
    tasks = []
    for index, (name, environment) in enumerate(zip(names, environments, strict=True)):
        with closing(_vector(environment, 1, evaluation=True)) as envs:
            spaces = envs.single_observation_space, envs.single_action_space
        _check_spaces(name, *spaces)
        tasks.append(EnvTask(name, environment, *spaces, index))
    return tasks


def _check_spaces(name: str, observations: Space[Any], actions: Space[Any]) -> None:
    from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete

    for what, space, wrapper in (
        ("observations", observations, "gymnasium.wrappers.FlattenObservation"),
        ("actions", actions, "a gymnasium.ActionWrapper"),
    ):
        if not isinstance(space, Box | Discrete | MultiBinary | MultiDiscrete):
            raise ValueError(
                f"Task {name!r} has {what} of {space}, which are no arrays: give a function that makes the "
                f"environment in a wrapper, such as {wrapper}"
            )
