"""A small environment."""

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete


class Counting(gymnasium.Env):
    """An environment whose reward is the action.

    Observations are the number of steps, the sum of the actions, and noise. An episode has ``length`` steps;
    it ends by itself, or because its time is up (``up``).
    """

    observation_space = Box(-100, 100, (3,), np.float64)

    def __init__(self, length=5, up=False, continuous=False):
        self.length, self.up = length, up
        self.action_space = Box(-1, 1, (1,), np.float32) if continuous else Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.drift = 0, 0.0
        return self.observation(), {}

    def step(self, action):
        self.time += 1
        reward = float(np.asarray(action).item())
        self.drift += reward
        over = self.time == self.length
        return self.observation(), reward, over and not self.up, over and self.up, {}

    def observation(self):
        return np.array([self.time, self.drift, self.np_random.normal()])
