"""EnvSequence: environments one after another in one fit, and again the same when it is resumed."""

from functools import partial

import gymnasium
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from gymnasium.wrappers import FlattenObservation
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from benchmarks.ppo import PPO, gaussian
from lightning_blip import BLIP, EnvSequence, ForgettingCurves, TaskBoundaries
from lightning_blip.tasks.environments import Episodes
from tests.helpers.networks import QUIET
from tests.helpers.stay_frozen import StayFrozen
from tests.tasks.test_boundaries import Recorder, same


class Counting(gymnasium.Env):
    """Shows how many steps were taken, and noise; pays the action, and ends, or has its time up."""

    observation_space = Box(-100, 100, (3,), np.float64)

    def __init__(self, length=5, up=False, continuous=False):
        self.length, self.up = length, up
        self.action_space = Box(-1, 1, (1,), np.float32) if continuous else Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.drift = 0, 0.0
        return self.seen(), {}

    def step(self, action):
        self.time += 1
        paid = float(np.asarray(action).item())
        self.drift += paid
        over = self.time == self.length
        return self.seen(), paid, over and not self.up, over and self.up, {}

    def seen(self):
        return np.array([self.time, self.drift, self.np_random.normal()])


def sequence(*makes, **options):
    makes = makes or (Counting, partial(Counting, 7))
    options = {
        "steps_per_task": 96, "num_envs": 4, "rollout_steps": 8, "updates_per_epoch": 2, "passes": 2,
        "batch_size": 12, "episodes": 3, "names": [f"game {i}" for i in range(len(makes))], **options,
    }  # fmt: skip
    return EnvSequence(makes, **options)


def agent(tasks=2, **options):
    return PPO(nn.Sequential(nn.Linear(3, 8), nn.Tanh()), 8, [2] * tasks, lr=0.01, **options)


def fit(tasks, module=None, callbacks=(), ckpt_path=None, **options):
    trainer = pl.Trainer(**{**QUIET, "num_sanity_val_steps": 0, "callbacks": list(callbacks), **options})
    trainer.fit(module or agent(), datamodule=tasks, ckpt_path=ckpt_path)
    return trainer


def test_it_reads_as_a_sequence_of_tasks():
    tasks = EnvSequence(["CartPole-v1", "Acrobot-v1"], steps_per_task=[1_000, 10_000], num_envs=4)
    assert [task.name for task in tasks] == ["CartPole-v1", "Acrobot-v1"]
    assert tasks.epochs == [1, 2]  # of 5,000 steps
    assert "> EnvTask('CartPole-v1'" in repr(tasks)
    assert "EnvSequence(0 of 2 tasks learned)" in repr(tasks)


def test_one_fit_learns_every_environment_and_everyone_hears_of_the_boundaries(tmp_path):
    recorder, curves = Recorder(), ForgettingCurves("val_return")
    trainer = fit(sequence(), callbacks=[recorder, curves], default_root_dir=tmp_path)
    assert recorder.events == [
        ("start", 0), ("epoch", 0), ("validated", 0, 1), ("epoch", 0), ("validated", 0, 1),
        ("end", 0), ("validated", 0, 1),
        ("start", 1), ("epoch", 1), ("validated", 1, 2), ("epoch", 1), ("validated", 1, 2),
        ("end", 1), ("validated", 1, 2),
    ]  # fmt: skip
    assert isinstance(trainer.callbacks[0], TaskBoundaries)
    assert curves.matrix.tril().isfinite().all()
    assert curves.matrix[1, 1] <= 7


class Noting(PPO):
    """Keeps its rollouts and batches, and with which head it acted."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(3, 8), nn.Tanh()), 8, [2, 2])
        self.rollouts, self.batches, self.acted, self.trained = [], [], [], []

    def act(self, observations, explore):
        self.acted.append((self.trainer.datamodule.task.index, explore, self.head.active, self.critic.active))
        return super().act(observations, explore)

    def targets(self, rollout):
        self.rollouts.append(rollout)
        return super().targets(rollout)

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)
        self.trained.append((self.trainer.datamodule.task.index, self.head.active))
        return super().training_step(batch, batch_idx)


def test_batches_are_the_rollout_shuffled_once_a_pass():
    module = Noting()
    fit(sequence(Counting, steps_per_task=64, episodes=1, names=["game"]), module)
    assert (len(module.rollouts), len(module.batches)) == (2, 2 * 2 * 3)
    whole = module.rollouts[0].observations.flatten(0, 1)
    for one_pass in (module.batches[:3], module.batches[3:6]):
        seen = torch.cat([observations for observations, _ in one_pass])
        assert torch.equal(seen.sort(0).values, whole.sort(0).values)
        assert not torch.equal(seen, whole)
    targets = super(Noting, module).targets(module.rollouts[0])
    for observations, batch in module.batches[:3]:
        for row, returned in zip(observations, batch["returns"], strict=True):
            (place,) = (whole == row).all(1).nonzero()
            assert targets["actions"].flatten()[place] == batch["actions"][(observations == row).all(1)]
            assert returned.isfinite()


def test_a_rollout_goes_on_through_the_ends_of_episodes_and_keeps_what_was_cut_off():
    module = Noting()
    fit(sequence(partial(Counting, up=True), steps_per_task=64, episodes=1, names=["game"]), module)
    first, second = module.rollouts
    assert first.observations[:, 0, 0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert second.observations[:, 0, 0].tolist() == [3, 4, 0, 1, 2, 3, 4, 0]
    assert torch.equal(first.following, second.observations[0])
    assert first.ended.nonzero().tolist() == first.cut.tolist() == [[4, i] for i in range(4)]
    assert first.after_cut[:, 0].tolist() == [5] * 4
    drift = first.rewards[:5].sum(0)
    assert torch.equal(first.after_cut[:, 1], drift)
    assert torch.equal(first.rewards, first.decisions["actions"].float())


def test_nothing_is_cut_off_where_episodes_end_by_themselves():
    module = Noting()
    fit(sequence(Counting, steps_per_task=64, episodes=1, names=["game"]), module)
    assert module.rollouts[0].cut.shape == (0, 2)
    assert int(module.rollouts[0].ended.sum()) == 4


def test_heads_follow_the_task_in_rollouts_and_the_environment_in_evaluation():
    module = Noting()
    trainer = fit(sequence(), module)
    assert set(module.trained) == {(0, 0), (1, 1)}
    assert {one for one in module.acted if one[1]} == {(0, True, 0, 0), (1, True, 1, 1)}
    assert {one[2] for one in module.acted if one[0] == 1 and not one[1]} == {0, 1}
    results = trainer.test(module, datamodule=trainer.datamodule, verbose=False)
    assert [set(result) for result in results] == [{f"test_return/dataloader_idx_{i}"} for i in range(2)]


def test_rollouts_are_made_in_the_precision_of_the_training():
    class Autocast(PPO):
        found = set()

        def act(self, observations, explore):
            self.found.add(("act", explore, torch.is_autocast_enabled("cpu")))
            return super().act(observations, explore)

        def targets(self, rollout):
            self.found.add(("targets", torch.is_autocast_enabled("cpu")))
            return super().targets(rollout)

    module = Autocast(nn.Sequential(nn.Linear(3, 8), nn.Tanh()), 8, [2, 2])
    fit(sequence(), module, [BLIP()], precision="bf16-mixed")
    assert Autocast.found == {("act", True, True), ("act", False, True), ("targets", True)}


def test_episodes_are_played_to_their_end_and_are_the_same_each_time():
    class Right(PPO):
        def act(self, observations, explore):
            assert not explore
            return {"actions": torch.ones(len(observations), dtype=torch.int64)}

    module = Right(nn.Linear(3, 8), 8, [2])
    assert Episodes(partial(Counting, 6), 3, seed=0).play(module).tolist() == [6, 6, 6]
    module = PPO(nn.Linear(4, 8), 8, [2])
    episodes = Episodes("CartPole-v1", 5, seed=3)
    returns = episodes.play(module)
    assert torch.equal(returns, episodes.play(module))
    assert len(set(returns.tolist())) > 1
    # Those who are out are not counted while the others go on.
    each = [Episodes("CartPole-v1", 1, seed=3 + i).play(module).item() for i in range(5)]
    assert returns.tolist() == each


def test_information_is_measured_on_new_rollouts_of_the_task():
    class Seeing(pl.Callback):
        seen = []

        def on_task_end(self, trainer, pl_module, task):
            self.seen.append(list(trainer.datamodule.task_dataloader()))

    fit(sequence(), Noting(), [Seeing()])
    assert [len(batches) for batches in Seeing.seen] == [2, 2]
    for batches, length in zip(Seeing.seen, (5, 7), strict=True):
        observations, actions = batches[0]
        assert observations.shape == (32, 3)
        assert actions.shape == (32,)
        assert observations[:, 0].max() == length - 1


def parts(**options):
    torch.manual_seed(1)
    return sequence(seed=7), agent(), BLIP(prior=1e-4, **options), Recorder()


class Killed(pl.Callback):
    """Ends a run right after a checkpoint was saved at this step."""

    def __init__(self, after):
        self.after = after

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.after:
            raise RuntimeError("killed")


@pytest.mark.parametrize(
    ("step", "basis"),
    [
        (4, "diagonal"),
        (6, "diagonal"),
        (17, "diagonal"),
        (30, "diagonal"),
        (17, "kronecker"),
        (40, "kronecker"),
    ],
)
def test_a_fit_resumed_in_the_middle_of_a_game_ends_as_the_unbroken_one(tmp_path, step, basis):
    tasks, whole, blip, unbroken = parts(basis=basis)
    fit(tasks, whole, [blip, unbroken])
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=step)
    tasks, module, first, recorder = parts(basis=basis)
    with pytest.raises(RuntimeError, match="killed"):
        fit(tasks, module, [first, recorder, saves, Killed(step)], enable_checkpointing=True)
    tasks, module, second, resumed = parts(basis=basis)
    with torch.no_grad():
        for theta in module.parameters():
            theta.zero_()
    trainer = fit(tasks, module, [second, resumed], ckpt_path=saves.best_model_path)
    assert trainer.global_step == 48
    assert same(module.state_dict(), whole.state_dict())
    assert same(second.bits(), blip.bits())
    assert same(second.precision(), blip.precision())
    assert second.tasks_learned == 2


def test_frozen_bits_stay_through_the_games_that_follow():
    blip = BLIP(prior=1e-6, pull=0.0, damping=0.0)
    frozen = StayFrozen(blip)
    fit(sequence(), agent(), [blip, frozen])
    assert sum(int((bits > 0).sum()) for bits in blip.bits().values()) > 10
    assert set(frozen.before) == {"body.0.weight", "body.0.bias"}


@pytest.mark.parametrize("basis", ["diagonal", "kronecker"])
def test_a_policy_of_continuous_actions_has_information_too(basis):
    make = partial(Counting, continuous=True)
    module = PPO(nn.Sequential(nn.Linear(3, 8), nn.Tanh()), 8, [1, 1], continuous=True)
    blip = BLIP(likelihood=gaussian, basis=basis)
    fit(sequence(make, partial(Counting, 7, continuous=True)), module, [blip])
    assert blip.tasks_learned == 2
    assert blip.last_boundary.information_gain > 0


def test_actions_out_of_bounds_are_clipped():
    class Far(PPO):
        def act(self, observations, explore):
            return {"actions": torch.full((len(observations), 1), 9.0)}

    module = Far(nn.Linear(3, 8), 8, [1], continuous=True)
    assert Episodes(partial(Counting, 4, continuous=True), 2, seed=0).play(module).tolist() == [4, 4]


class Whimsical(Counting):
    def seen(self):
        return np.random.default_rng().normal(size=3)


def test_an_environment_that_does_not_repeat_itself_is_told_of(tmp_path):
    def whimsical():
        return sequence(Whimsical, partial(Whimsical, 7))

    saves = ModelCheckpoint(tmp_path, every_n_train_steps=4)
    fit(whimsical(), callbacks=[saves], max_steps=4, enable_checkpointing=True)
    with pytest.warns(UserWarning, match="did not do again what it did before"):
        fit(whimsical(), ckpt_path=saves.best_model_path)


def test_atari_is_played_by_its_own_environments_and_goes_on_where_it_was():
    def sequence_of_frames():
        tasks = EnvSequence(
            ["ALE/Boxing-v5"], steps_per_task=64, num_envs=2, rollout_steps=16, updates_per_epoch=2, passes=1,
            batch_size=32,
        )  # fmt: skip
        return _attached(tasks, PPO(nn.Sequential(nn.Flatten(), Bytes(), nn.Linear(4 * 84 * 84, 4)), 4, [18]))

    loader = sequence_of_frames().train_dataloader()
    torch.manual_seed(2)
    frames = iter(loader)
    next(frames)
    state, drawn = loader.state_dict(), torch.get_rng_state()
    expected = next(frames)
    assert expected[0].shape == (32, 4, 84, 84)
    assert expected[0].dtype == torch.uint8
    again = sequence_of_frames().train_dataloader()
    again.load_state_dict(state)
    torch.set_rng_state(drawn)
    (found,) = again
    assert torch.equal(found[0], expected[0])


class Bytes(nn.Module):
    def forward(self, x):
        return x / 255


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_envs": 0}, "num_envs=0 must be at least 1"),
        ({"steps_per_task": [10]}, r"steps_per_task=\[10\] must be one number, or one for each of the 2"),
        ({"names": ["a"]}, r"names=\['a'\] must be one for each of the 2"),
        ({"names": ["a", "a"]}, r"Tasks share the names \['a'\]"),
    ],
)
def test_arguments_that_are_off_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        sequence(**options)
    with pytest.raises(ValueError, match="is no sequence"):
        EnvSequence([], steps_per_task=10)


def test_a_module_that_cannot_act_is_told_what_to_define():
    class Passive(pl.LightningModule):
        pass

    with pytest.raises(ValueError, match="Passive has no act and no targets: define what"):
        sequence().__class__.setup(_attached(sequence(), Passive()), "fit")


def _attached(tasks, module):
    trainer = pl.Trainer(**QUIET)
    trainer.strategy.connect(module)
    tasks.trainer = trainer
    return tasks


def test_without_gymnasium_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gymnasium", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-blip\[rl\]'"):
        EnvSequence(["CartPole-v1"], steps_per_task=1)


class Shown(Counting):
    """Shows what it counts in any space."""

    def __init__(self, space, show, length=5):
        super().__init__(length)
        self.observation_space, self.show = space, show

    def seen(self):
        return self.show(self.time)


PARTS = Dict({"time": Discrete(8), "speed": Box(-1, 1, (2,))})
BOTH = Tuple([Box(0, 1, (1,)), Discrete(3)])


class Pressing(Counting):
    """Has other actions."""

    def __init__(self, space):
        super().__init__()
        self.action_space = space

    def step(self, action):
        assert self.action_space.contains(np.asarray(action, self.action_space.dtype))
        return super().step(np.asarray(action).sum())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (partial(Shown, PARTS, None), r"Task 'it' has observations of Dict\(.*FlattenObservation"),
        (partial(Shown, BOTH, None), r"Task 'it' has observations of Tuple\(.*FlattenObservation"),
        (partial(Pressing, PARTS), r"Task 'it' has actions of Dict\(.*ActionWrapper"),
    ],
)
def test_what_is_no_array_is_refused_and_the_wrapper_named(make, said):
    with pytest.raises(ValueError, match=said):
        sequence(make, names=["it"])


def test_the_wrapper_that_is_named_helps():
    def show(time):
        return {"time": time, "speed": np.zeros(2, np.float32)}

    module = PPO(nn.Linear(10, 8), 8, [2])
    fit(sequence(lambda: FlattenObservation(Shown(PARTS, show)), names=["flat"]), module)
    assert module.trainer.global_step == 24


def test_numbered_observations_are_learned_from():
    class Looking(PPO):
        rollouts = []

        def targets(self, rollout):
            self.rollouts.append(rollout)
            return super().targets(rollout)

    make = partial(Shown, Discrete(8), lambda time: time)
    blip, module = BLIP(), Looking(nn.Embedding(8, 8), 8, [2])
    fit(sequence(make, steps_per_task=64, names=["numbered"]), module, [blip])
    assert module.rollouts[0].observations[:, 0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert blip.last_boundary.information_gain > 0


@pytest.mark.parametrize("space", [MultiDiscrete([2, 3]), MultiBinary(2)])
def test_several_actions_at_once_are_learned(space):
    """Whatever they are, the module says how they are drawn."""

    def policy(output):
        drawn = torch.distributions.Categorical(logits=output.unflatten(-1, (2, 2)))
        return torch.distributions.Independent(drawn, 1)

    module, blip = PPO(nn.Linear(3, 8), 8, [4]), BLIP(likelihood=policy)
    module.policy = policy
    fit(sequence(partial(Pressing, space), steps_per_task=64, names=["pressing"]), module, [blip])
    assert module.trainer.global_step == 12
    assert blip.last_boundary.information_gain > 0


def test_observations_of_different_shapes_are_told_of():
    make = partial(Shown, Box(0, 9, (4,)), lambda time: np.full(4, time, np.float32))
    tasks = sequence(Counting, make)
    with pytest.warns(UserWarning, match=r"shapes \[\(3,\), \(4,\)\]: unless .*TransformObservation"):
        _attached(tasks, agent()).setup("fit")


def test_evaluation_needs_no_fit():
    torch.manual_seed(0)
    module, tasks = agent(), sequence()
    trainer = pl.Trainer(**QUIET)
    (validated,) = trainer.validate(module, datamodule=tasks, verbose=False)
    tested = trainer.test(module, datamodule=tasks, verbose=False)
    assert set(validated) == {"val_return"}
    assert tested[0]["test_return/dataloader_idx_0"] == validated["val_return"]
    assert len(tested) == 2


def test_prediction_plays_every_environment_or_is_refused():
    class Predicting(PPO):
        def predict_step(self, episodes, batch_idx, dataloader_idx=0):
            return self.head.active, episodes.play(self)

    trainer = pl.Trainer(**QUIET)
    module = Predicting(nn.Sequential(nn.Linear(3, 8), nn.Tanh()), 8, [2, 2])
    predicted = [one for (one,) in trainer.predict(module, datamodule=sequence())]
    assert [(head, len(returns)) for head, returns in predicted] == [(0, 3), (1, 3)]
    with pytest.raises(
        ValueError, match=r"PPO has no predict_step.* such as to return episodes.play\(self\)"
    ):
        trainer.predict(agent(), datamodule=sequence())


class Closed(Counting):
    """Counts those that are open."""

    left = 0

    def __init__(self, breaks=False):
        super().__init__()
        self.breaks = breaks
        Closed.left += 1

    def step(self, action):
        if self.breaks:
            raise RuntimeError("broken")
        return super().step(action)

    def close(self):
        Closed.left -= 1


class Failing(pl.Callback):
    def on_train_batch_end(self, *_):
        raise RuntimeError("broken")


@pytest.mark.parametrize("options", [{"breaks": True}, {}])
def test_environments_are_closed_when_a_fit_fails(options):
    Closed.left = 0
    with pytest.raises(RuntimeError, match="broken"):
        fit(sequence(partial(Closed, **options), names=["it"]), agent(1), [Failing()])
    assert Closed.left == 0


def test_epochs_may_be_cut_short(tmp_path):
    Closed.left = 0
    blip, curves = BLIP(), ForgettingCurves("val_return")
    options = {"limit_train_batches": 5, "default_root_dir": tmp_path}
    trainer = fit(sequence(Closed, names=["it"]), agent(1), [blip, curves], **options)
    assert (trainer.global_step, blip.tasks_learned) == (10, 1)
    assert curves.matrix.isfinite().all()
    assert Closed.left == 0


class Stopping(pl.Callback):
    """Ends a fit as ``max_time`` does, but by its steps."""

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == 5


def test_a_fit_that_is_stopped_within_an_epoch_goes_on_later(tmp_path):
    Closed.left = 0
    saving = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    tasks = partial(sequence, Closed, names=["it"])
    first = fit(tasks(), agent(1), [saving, Stopping()], enable_checkpointing=True)
    assert (first.global_step, Closed.left) == (5, 0)
    blip = BLIP()
    second = fit(tasks(), agent(1), [blip], ckpt_path=saving.last_model_path)
    # As with data sets, the epoch that was cut short is over: the second one is left, of 12 steps.
    assert (second.global_step, blip.tasks_learned) == (17, 1)
