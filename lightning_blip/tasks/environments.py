"""The data module that feeds environments as a sequence of tasks within one fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_blip.tasks.boundaries import add_boundaries
from lightning_blip.tasks.rollouts import Episodes, Players, Rollout, vector_environment
from lightning_blip.tasks.sequence import TaskSequence, check_names
from lightning_blip.trainer import processes
from lightning_blip.trainer.classes import overrides
from lightning_blip.trainer.random_state import generator_of

if TYPE_CHECKING:
    from gymnasium import Space

# The purpose is part of a key, so that no two keys of a sequence are the same.
_TRAINING, _INFORMATION, _EVALUATION = range(3)


@dataclass(frozen=True)
class EnvTask:
    """One environment of a sequence.

    Attributes:
        name: The task's name in logs, tables and figures.
        environment: The environment's id, or a function that makes it.
        observation_space: The space of one environment's observations, after preprocessing.
        action_space: The space of one environment's actions.
        index: The task's position in its sequence, from 0.
    """

    name: str
    environment: Any
    observation_space: Space[Any]
    action_space: Space[Any]
    index: int

    def __repr__(self) -> str:
        return f"EnvTask({self.name!r}, observations={self.observation_space}, actions={self.action_space})"


class EnvSequence(TaskSequence[EnvTask]):
    """Feed environments one after another, so that one ``trainer.fit`` learns the whole sequence.

    It is to environments what :class:`TaskSequenceDataModule` is to data sets. It maps environments to the
    Trainer's loops as follows, so that every callback for the one works on the other.

    - A **batch** is a mini-batch ``(observations, targets)`` of a rollout. A rollout is ``rollout_steps``
      steps of ``num_envs`` environments with the module's ``act``; the module's ``targets`` computes the
      targets from it (see :class:`Agent`). Each rollout is used ``passes`` times, shuffled each time, before
      the next one is made. ``training_step`` is an ordinary one, in automatic optimization.
    - An **epoch** is ``updates_per_epoch`` rollouts. At its start the environments are reset, seeded by the
      task and the epoch. A fit that is resumed within an epoch resets them, too, and repeats the actions that
      were taken, so that any environment reaches the state it had.
    - **Validation** has one loader for each environment seen so far, with one batch, :class:`Episodes`:
      ``validation_step(self, episodes, batch_idx, dataloader_idx=0)`` plays and logs them,
      ``self.log("val_return", episodes.play(self).mean(), batch_size=episodes.count)``.
    - **Test** and **prediction** have one loader for every environment, with ``test_step`` and
      ``predict_step``.
    - A task's **information** is measured on the observations of new rollouts, made by the network at the end
      of the task; no data is stored for it. If ``forward(observations)`` returns logits of discrete actions,
      its likelihood is BLIP's default.

    Atari's ids (``"ALE/Boxing-v5"``) use ale-py's own vector environment, with its preprocessing: four grey
    frames of 84x84, every fourth frame, rewards clipped in training and not in evaluation.

    Observations and actions are arrays (``Box``, ``Discrete``, ``MultiDiscrete`` or ``MultiBinary`` spaces).
    With several processes, each trains in its own environments, and all play the same episodes in evaluation.

    Args:
        environments: Ids that Gymnasium knows, or functions that make an environment, in the order of
            learning.
        steps_per_task: The number of steps per task, summed over the environments of a process: one number
            for all tasks, or one per task; rounded up to whole epochs.
        num_envs: The number of environments side by side, in each process.
        rollout_steps: The number of steps of each environment in a rollout.
        updates_per_epoch: The number of rollouts per epoch.
        passes: The number of times that each rollout is used.
        batch_size: The number of samples per batch, in each process.
        episodes: The number of episodes in evaluation.
        names: The names of the tasks; by default the ids, or the names of the functions.
        seed: The seed of the environments and of the order of samples.

    Raises:
        ImportError: If Gymnasium is not installed.
        ValueError: If there is no environment, two share a name, observations or actions are not arrays, or
            an argument is invalid. In a fit, if the module has no ``act`` or ``targets``; in prediction, if
            it has no ``predict_step``.

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
        """The module that acts: the one that the Trainer trains."""
        assert self.trainer is not None
        return self.trainer.lightning_module

    def setup(self, stage: str) -> None:
        """Add the :class:`TaskBoundaries` callback to the Trainer, and check that the module can act."""
        assert self.trainer is not None
        add_boundaries(self.trainer)
        missing = [name for name in ("act", "targets") if not hasattr(self.agent, name)]
        if missing:
            raise ValueError(
                f"{type(self.agent).__name__} has no {' and no '.join(missing)}: define what "
                "lightning_blip.tasks.rollouts.Agent describes, so that EnvSequence can make rollouts"
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
                f"Observations have the shapes {shapes}: unless the module takes them all, give them one "
                "shape, by functions that make the environments in a wrapper, such as "
                "gymnasium.wrappers.TransformObservation"
            )

    def train_dataloader(self) -> Iterable[Any]:
        """Return the mini-batches of this epoch's rollouts."""
        return _EpochOfRollouts(self, self._key(_TRAINING, self.epoch, processes.rank_and_world_size()[0]))

    def task_dataloader(self) -> Iterable[Any]:
        """Return observations and actions of new rollouts, as many as an epoch has."""
        return _Observed(self, self._key(_INFORMATION, processes.rank_and_world_size()[0]))

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Return one loader for each environment seen so far, that of the current one last."""
        return [self._episodes(task) for task in self.tasks[: self.task.index + 1]]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Return one loader for every environment, whether learned or not."""
        return [self._episodes(task) for task in self.tasks]

    predict_dataloader = test_dataloader

    def players(self, key: tuple[int, ...]) -> Players:
        """Return the environments of the current task, seeded by a key."""
        return Players(self.task.environment, self.num_envs, _seed(key), self.agent.device)

    def _key(self, *rest: int) -> tuple[int, ...]:
        return (self.seed, self.task.index, *rest)

    def _episodes(self, task: EnvTask) -> DataLoader[Any]:
        key = (self.seed, task.index, _EVALUATION)
        episodes = Episodes(task.environment, self.episodes, _seed(key))
        return DataLoader(cast(Any, [episodes]), batch_size=None, generator=generator_of(key))


class _EpochOfRollouts:
    """The mini-batches of an epoch's rollouts; continues within the epoch if its state was saved there."""

    def __init__(self, tasks: EnvSequence, key: tuple[int, ...]) -> None:
        self._tasks = tasks
        self._key = key
        self._state = _Progress()

    def __len__(self) -> int:
        return self._tasks.updates_per_epoch * self._batches_per_rollout

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
        """Return, by the key of each process, the actions so far and the targets of the last rollout."""
        done = self._state
        targets = {name: value.cpu() for name, value in done.targets.items()}
        saved = replace(done, actions=list(done.actions), targets=targets)
        return dict(processes.gathered((self._key, vars(saved))))

    def load_state_dict(self, state_dict: dict[tuple[int, ...], dict[str, Any]]) -> None:
        """Continue where the saved loader was, if it was of the same epoch and process."""
        if self._key in state_dict:
            self._state = _Progress(**state_dict[self._key])

    @property
    def _batches_per_rollout(self) -> int:
        tasks = self._tasks
        return tasks.passes * -(-tasks.num_envs * tasks.rollout_steps // tasks.batch_size)

    def _batches(
        self, update: int, rollout: Rollout, targets: dict[str, Tensor]
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        observations = rollout.observations.flatten(0, 1)
        flat = {name: value.to(observations.device).flatten(0, 1) for name, value in targets.items()}
        batch = update * self._batches_per_rollout
        for number in range(self._tasks.passes):
            order = torch.randperm(len(observations), generator=generator_of((*self._key, update, number)))
            for indices in order.to(observations.device).split(self._tasks.batch_size):
                batch += 1
                if batch > self._state.given:
                    self._state.given = batch
                    yield observations[indices], {name: value[indices] for name, value in flat.items()}


@dataclass
class _Progress:
    """The progress within an epoch.

    Attributes:
        given: The number of batches given.
        actions: The actions of each rollout.
        following: The observations after the last rollout.
        targets: The targets of the last rollout.
    """

    given: int = 0
    actions: list[Tensor] = field(default_factory=list)
    following: Tensor = field(default_factory=lambda: torch.zeros(0))
    targets: dict[str, Tensor] = field(default_factory=dict)


class _Observed:
    """The observations and actions of rollouts on which the information is measured."""

    def __init__(self, tasks: EnvSequence, key: tuple[int, ...]) -> None:
        self._tasks = tasks
        self._key = key

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        with closing(self._tasks.players(self._key)) as players:
            for _ in range(self._tasks.updates_per_epoch):
                rollout = players.roll(_acting(self._tasks), self._tasks.rollout_steps)
                yield rollout.observations.flatten(0, 1), rollout.decisions["actions"].flatten(0, 1)


def _acting(tasks: EnvSequence) -> Callable[[Tensor], dict[str, Tensor]]:
    def decide(observations: Tensor) -> dict[str, Tensor]:
        with _precision(tasks):
            decisions: dict[str, Tensor] = tasks.agent.act(observations, explore=True)
        return decisions

    return decide


def _precision(tasks: EnvSequence) -> AbstractContextManager[None]:
    """Return the context of the Trainer's precision: steps compare their probabilities with a rollout's."""
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
            "continues from its present state"
        )


def _seed(key: tuple[int, ...]) -> int:
    return int(torch.randint(2**30, (), generator=generator_of(key)))


def _tasks(environments: Sequence[Any], names: Sequence[str] | None) -> list[EnvTask]:
    if not environments:
        raise ValueError("environments=[] is no sequence: give at least one environment")
    if names is None:
        names = [one if isinstance(one, str) else getattr(one, "__name__", repr(one)) for one in environments]
    if len(names) != len(environments):
        raise ValueError(f"names={list(names)} must be one for each of the {len(environments)} environments")
    check_names(names)
    tasks = []
    for index, (name, environment) in enumerate(zip(names, environments, strict=True)):
        with closing(vector_environment(environment, 1, evaluation=True)) as envs:
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
                f"Task {name!r} has {what} of {space}, which are not arrays: give a function that makes the "
                f"environment in a wrapper, such as {wrapper}"
            )
