"""Methods that BLIP is compared with, as callbacks on the same two hooks, and joint training."""

from lightning_blip.baselines.ewc import EWC
from lightning_blip.baselines.frozen_body import FrozenBody
from lightning_blip.baselines.gpm import GPM
from lightning_blip.baselines.joint import JointTraining
from lightning_blip.baselines.lwf import LwF
from lightning_blip.baselines.mas import MAS
from lightning_blip.baselines.si import SI

__all__ = ["EWC", "GPM", "MAS", "SI", "FrozenBody", "JointTraining", "LwF"]
