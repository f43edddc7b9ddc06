"""What BLIP is measured against: methods as callbacks on the same two hooks."""

from benchmarks.baselines.ewc import EWC
from benchmarks.baselines.finetune import FineTuning
from benchmarks.baselines.frozen import FrozenBody
from benchmarks.baselines.gpm import GPM
from benchmarks.baselines.lwf import LwF
from benchmarks.baselines.mas import MAS
from benchmarks.baselines.si import SI

__all__ = ["EWC", "GPM", "MAS", "SI", "FineTuning", "FrozenBody", "LwF"]
