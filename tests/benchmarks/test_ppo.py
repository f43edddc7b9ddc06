"""PPO: its advantages and losses agree with slow versions, and it learns CartPole."""

import math
from dataclasses import replace

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.distributions import Categorical, Normal

from benchmarks import learning, run
from benchmarks.games import GAMES, cartpole
from benchmarks.ppo import PPO, advantage, categorical, gaussian
from benchmarks.record import Record
from benchmarks.trainer import quiet_trainer
from lightning_blip.tasks.rollouts import Episodes, Rollout


def by_definition(rewards, values, ended, following, discount, trace):
    """Return the advantages as a sum over later steps, written out for each step."""
    steps = len(rewards)
    after = [*values[1:], following]
    advantages = []
    for t in range(steps):
        total = 0.0
        for k in range(t, steps):
            goes_on = 0.0 if ended[k] else 1.0
            surprise = rewards[k] + discount * goes_on * after[k] - values[k]
            total += (discount * trace) ** (k - t) * surprise
            if ended[k]:
                break
        advantages.append(total)
    return advantages


def test_advantages_agree_with_their_definition():
    rewards, values = torch.randn(2, 20, 3)
    ended, following = torch.rand(20, 3) < 0.2, torch.randn(3)
    found = advantage(rewards, values, ended, following, 0.9, 0.8)
    for env in range(3):
        expected = by_definition(
            *(part[..., env].tolist() for part in (rewards, values, ended, following)), 0.9, 0.8
        )
        assert found[:, env].tolist() == pytest.approx(expected, abs=1e-5)


def test_with_a_trace_of_one_returns_are_discounted_rewards_plus_values_at_a_cut():
    agent = PPO(nn.Linear(2, 4), 4, [2], discount=0.5, trace=1.0, reward_scale=2.0)
    observations = torch.randn(3, 1, 2)
    ended = torch.tensor([[False], [True], [False]])
    decisions = agent.act(observations.flatten(0, 1), explore=True)
    decisions = {name: value.detach()[:, None] for name, value in decisions.items()}
    last, following = torch.randn(1, 2), torch.randn(1, 2)
    rewards = torch.tensor([[1.0], [3.0], [5.0]])
    rollout = Rollout(observations, decisions, rewards, ended, following, torch.tensor([[1, 0]]), last)
    with torch.no_grad():
        at_cut, to_come = (agent.critic(agent.body(one)).item() for one in (last, following))
    second = 6 + 0.5 * at_cut
    assert agent.targets(rollout)["returns"].flatten().tolist() == pytest.approx(
        [2 + 0.5 * second, second, 10 + 0.5 * to_come], abs=1e-5
    )


def test_the_loss_agrees_with_that_of_the_paper_per_sample():
    agent = PPO(nn.Linear(2, 4), 4, [3], clip=0.1, value_weight=0.5, entropy_weight=0.01)
    agent.log_dict = lambda _: None
    x, actions, advantages, returns = torch.randn(6, 2), torch.arange(6) % 3, torch.randn(6), torch.randn(6)
    old = torch.full((6,), math.log(1 / 3)) + torch.tensor([0.3, -0.3, 0.05, 0.3, -0.3, -0.05])
    batch = {"actions": actions, "log_probs": old, "advantages": advantages, "returns": returns}
    with torch.no_grad():
        logits, values = agent(x), agent.critic(agent.body(x))[:, 0]
    scaled = (advantages - advantages.mean()) / advantages.std()
    losses = []
    for i in range(6):
        policy = Categorical(logits=logits[i])
        ratio = math.exp(policy.log_prob(actions[i]) - old[i])
        gain = min(ratio * scaled[i], min(max(ratio, 0.9), 1.1) * scaled[i])
        losses.append(-gain + 0.25 * (values[i] - returns[i]) ** 2 - 0.01 * policy.entropy())
    found = agent.training_step((x, batch), 0)
    assert found.item() == pytest.approx(float(torch.stack(losses).mean()), abs=1e-5)


def test_policies_have_the_given_parameters():
    output = torch.tensor([[0.5, -1.0, math.log(2.0), 0.0]])
    action = torch.tensor([[1.0, 2.0]])
    expected = Normal(0.5, 2.0).log_prob(action[0, 0]) + Normal(-1.0, 1.0).log_prob(action[0, 1])
    assert gaussian(output).log_prob(action).item() == pytest.approx(expected.item())
    assert categorical(output).probs[0].tolist() == pytest.approx(output.softmax(1)[0].tolist())


def test_the_learning_rate_decays_to_zero_over_each_task_and_gradients_are_clipped():
    class Watching(pl.Callback):
        rates, norms = [], []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            norms = [theta.grad.norm() for theta in pl_module.parameters() if theta.grad is not None]
            self.norms += [torch.stack(norms).norm().item()] if norms else []

    games = short(2)
    fitted(games, [Watching()], max_norm=0.01)
    each = len(Watching.rates) // 2
    falling = [1e-3 * (1 - step / each) for step in range(each)]
    assert Watching.rates == pytest.approx(2 * falling)
    assert max(Watching.norms) == pytest.approx(0.01, rel=1e-3)


def short(tasks, **options):
    sizes = {
        "num_envs": 2,
        "rollout_steps": 16,
        "updates_per_epoch": 2,
        "passes": 2,
        "batch_size": 16,
        "episodes": 2,
    }
    return replace(GAMES["cartpole"], tasks=tasks, epochs=1, options={**sizes, **options})


def fitted(games, callbacks=(), **agent):
    pl.seed_everything(0, verbose=False)
    games = replace(games, agent={**games.agent, **agent})
    module = games.module()
    trainer = quiet_trainer(list(callbacks), num_sanity_val_steps=0)
    trainer.fit(module, datamodule=games.stream(None, seed=0))
    return module


@pytest.mark.parametrize("method", ["ewc", "mas", "gpm", "blip-kronecker", "blip-paper"])
def test_methods_for_data_sets_learn_games_too(method, tmp_path):
    record = learning.Run(short(2), method, {}).learn(tmp_path, seed=0, report=lambda *_: None)
    (first, _), second = record.R
    assert 0 < first <= 100
    assert 0 < min(second) <= max(second) <= 100
    assert abs(2 * record.ACC - sum(second)) < 1e-3


def test_methods_that_need_labels_are_refused_for_games(capsys):
    with pytest.raises(SystemExit):
        run.main(["cartpole", "--method", "joint"])
    assert "joint needs labels, which cartpole does not have" in capsys.readouterr().err


def test_a_run_of_games_leaves_a_record(tmp_path, monkeypatch):
    monkeypatch.setitem(learning.STREAMS, "cartpole", short(2))
    run.main(["cartpole", "--method", "blip", "--seeds", "1", "--tasks", "1", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("*.json")
    assert path.name == "cartpole-blip-tasks=1-seed0.json"
    assert len(Record.read(path).used_capacity) == 1


def test_cartpole_falls_according_to_its_physics():
    def angle_after(**physics):
        environment = cartpole(**physics)
        environment.reset(seed=0)
        for _ in range(8):
            observation = environment.step(1)[0]
        return observation[2]

    usual = angle_after()
    assert usual < 0
    assert angle_after(force_mag=-10.0) > 0
    assert angle_after(length=2.0) > usual


def test_the_atari_agent_fits_the_games_and_the_settings_of_the_paper():
    games = GAMES["atari6"]
    stream, module = games.stream(None, seed=0), games.module()
    assert [task.action_space.n for task in stream.tasks] == [head.out_features for head in module.head.heads]
    assert module(torch.full((2, 4, 84, 84), 255, dtype=torch.uint8)).shape == (2, 14)
    assert stream.epochs == [500] * 6
    assert (stream.num_envs * stream.rollout_steps) // stream.batch_size == 8


@pytest.mark.nightly
def test_cartpole_is_solved():
    games = GAMES["cartpole"]
    games = replace(games, tasks=1, environments={"CartPole-v1": "CartPole-v1"}, epochs=5)
    module = fitted(games).eval()
    assert float(Episodes("CartPole-v1", 100, seed=1_000).play(module).mean()) >= 475
