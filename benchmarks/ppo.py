"""Proximal policy optimization: an agent that learns one environment, or several one after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal

from lightning_blip import TaskHeads
from lightning_blip.tasks.rollouts import Episodes, Rollout


def categorical(output: Tensor) -> Distribution:
    """Return the policy over discrete actions with logits (N, actions)."""
    return Categorical(logits=output)


def gaussian(output: Tensor) -> Distribution:
    """Return the policy over continuous actions with means and log standard deviations (N, 2 · actions)."""
    mean, log_deviation = output.chunk(2, -1)
    return Independent(Normal(mean, log_deviation.clamp(-5.0, 2.0).exp()), 1)


class PPO(pl.LightningModule):
    """An actor and a critic with a shared body, and one head each per task.

    Weights start orthogonal and biases at zero; the learning rate decays linearly to zero over each task.

    Args:
        body: Maps observations to features.
        features: The number of features.
        actions: For each task, the number of discrete actions or the dimension of continuous ones.
        continuous: Whether actions are continuous, from normal distributions with learned means and standard
            deviations.
        lr: The learning rate of Adam at the start of a task.
        clip: The largest difference from 1 of the ratio of new to old probabilities that counts.
        discount: γ.
        trace: λ of the generalised advantage estimate.
        value_weight: The weight of the critic's loss.
        entropy_weight: The weight of the policy's entropy.
        max_norm: The largest norm of the gradient.
        reward_scale: A factor for rewards, which keeps the critic's loss from outweighing the policy's.

    Source:
        Schulman, Wolski, Dhariwal, Radford, Klimov, Proximal policy optimization algorithms, arXiv
        1707.06347, without clipping the critic's loss. The defaults are those of Shi et al., CVPR 2021, for
        Atari.
    """

    def __init__(
        self,
        body: nn.Module,
        features: int,
        actions: Sequence[int],
        continuous: bool = False,
        lr: float = 2.5e-4,
        clip: float = 0.1,
        discount: float = 0.99,
        trace: float = 0.95,
        value_weight: float = 0.5,
        entropy_weight: float = 0.01,
        max_norm: float = 0.5,
        reward_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.body = body
        self.head = TaskHeads(features, [2 * count for count in actions] if continuous else actions)
        self.critic = TaskHeads(features, [1] * len(actions))
        self.policy = gaussian if continuous else categorical
        self.lr = lr
        self.clip = clip
        self.discount = discount
        self.trace = trace
        self.value_weight = value_weight
        self.entropy_weight = entropy_weight
        self.max_norm = max_norm
        self.reward_scale = reward_scale
        for part, gain in ((self.body, 2**0.5), (self.head, 0.01), (self.critic, 1.0)):
            _begin_orthogonal(part, gain)

    def forward(self, observations: Tensor) -> Tensor:
        """Return the parameters of the policy: logits, or means and log standard deviations."""
        output: Tensor = self.head(self.body(observations)).float()
        return output

    def act(self, observations: Tensor, explore: bool) -> dict[str, Tensor]:
        """Draw an action or take the most probable one; return it with its log-probability and value."""
        features = self.body(observations)
        policy = self.policy(self.head(features).float())
        actions = policy.sample() if explore else policy.mode
        return {
            "actions": actions,
            "log_probs": policy.log_prob(actions),
            "values": self._values(features),
        }

    @torch.no_grad()
    def targets(self, rollout: Rollout) -> dict[str, Tensor]:
        """Add advantages and returns; at a time limit the critic's value stands for the later rewards."""
        rewards = self.reward_scale * rollout.rewards
        if len(rollout.cut):
            rewards[tuple(rollout.cut.T)] += self.discount * self._values(self.body(rollout.after_cut))
        values = rollout.decisions["values"]
        advantages = advantage(
            rewards,
            values,
            rollout.ended,
            self._values(self.body(rollout.following)),
            self.discount,
            self.trace,
        )
        return {**rollout.decisions, "advantages": advantages, "returns": advantages + values}

    def training_step(self, batch: tuple[Tensor, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Return the clipped policy loss plus the critic's loss minus the policy's entropy, weighted."""
        observations, old = batch
        features = self.body(observations)
        policy, values = self.policy(self.head(features).float()), self._values(features)
        ratio = (policy.log_prob(old["actions"]) - old["log_probs"]).exp()
        near = ratio.clamp(1 - self.clip, 1 + self.clip)
        advantages = old["advantages"]
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        policy_loss = -torch.minimum(ratio * advantages, near * advantages).mean()
        value_loss = 0.5 * (values - old["returns"]).square().mean()
        entropy = policy.entropy().mean()
        self.log_dict({"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy})
        loss: Tensor = policy_loss + self.value_weight * value_loss - self.entropy_weight * entropy
        return loss

    def validation_step(self, batch: Episodes, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the mean return of the episodes."""
        self.log("val_return", batch.play(self).mean(), batch_size=batch.count)

    def test_step(self, batch: Episodes, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the mean return of the episodes."""
        self.log("test_return", batch.play(self).mean(), batch_size=batch.count)

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:
        """Clip the norm of the gradient."""
        self.clip_gradients(optimizer, self.max_norm, "norm")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return Adam with a learning rate that decays to zero over the task."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr, eps=1e-5)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _values(self, features: Tensor) -> Tensor:
        values: Tensor = self.critic(features).squeeze(-1).float()
        return values


def advantage(
    rewards: Tensor, values: Tensor, ended: Tensor, following: Tensor, discount: float, trace: float
) -> Tensor:
    """Return the generalised advantage estimate.

    Args:
        rewards: The rewards, (T, N).
        values: The critic's values before each step, (T, N).
        ended: Whether the episode ended with the step, (T, N).
        following: The critic's values after the last step, (N,).
        discount: γ.
        trace: λ.

    Returns:
        (T, N): Σ_k (γλ)^k · δ_{t+k} up to the episode's end, δ_t = r_t + γ·V_{t+1} − V_t.

    Example:
        >>> one = torch.ones(2, 1)
        >>> advantage(one, 0 * one, one < 0, torch.zeros(1), discount=0.5, trace=1.0).T
        tensor([[1.5000, 1.0000]])

    Source:
        Schulman, Moritz, Levine, Jordan, Abbeel, High-dimensional continuous control using generalized
        advantage estimation, ICLR 2016.
    """
    goes_on = (~ended).to(rewards.dtype)
    surprise = rewards + discount * goes_on * torch.cat([values[1:], following[None]]) - values
    advantages, later = torch.zeros_like(rewards), torch.zeros_like(following)
    for time in reversed(range(len(rewards))):
        later = surprise[time] + discount * trace * goes_on[time] * later
        advantages[time] = later
    return advantages


def _begin_orthogonal(module: nn.Module, gain: float) -> None:
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            nn.init.orthogonal_(part.weight, gain)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
