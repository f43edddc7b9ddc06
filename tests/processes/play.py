"""Learn two small environments in two processes, unbroken and resumed, and save each process's results."""

import sys
from functools import partial
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from benchmarks.ppo import PPO
from lightning_blip import BLIP, EnvSequence, ForgettingCurves
from tests.helpers.environments import Counting
from tests.helpers.networks import QUIET

# Step 59 of 96 is in the second task, among the batches of an epoch's second rollout.
SAVED = 59


class Noting(PPO):
    """An agent that keeps its first rollout."""

    first = None

    def targets(self, rollout):
        self.first = rollout if self.first is None else self.first
        return super().targets(rollout)


def learn(folder: Path, max_steps: int = -1, ckpt_path: str | None = None) -> tuple[dict, str]:
    """Return this process's results, and the path of the checkpoint that was saved within the fit."""
    pl.seed_everything(0, verbose=False)
    tasks = EnvSequence(
        [Counting, partial(Counting, 7)], steps_per_task=192, num_envs=2, rollout_steps=16,
        updates_per_epoch=2, passes=2, batch_size=8, episodes=3, names=["five", "seven"],
    )  # fmt: skip
    module = Noting(nn.Sequential(nn.Linear(3, 8), nn.Tanh()), 8, [2, 2], lr=0.01)
    blip, curves = BLIP(prior=1e-4), ForgettingCurves("val_return")
    saves = ModelCheckpoint(folder, every_n_train_steps=SAVED)
    trainer = pl.Trainer(
        **{**QUIET, "callbacks": [blip, curves, saves], "enable_checkpointing": True},
        devices=2, strategy="ddp_find_unused_parameters_true", max_steps=max_steps, default_root_dir=folder,
        num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=tasks, ckpt_path=ckpt_path)
    results = {
        "weights": dict(module.state_dict()),
        "bits": blip.bits(),
        "precision": blip.precision(),
        "chosen": blip.chosen,
        "matrix": curves.matrix,
        "first": module.first and module.first.observations,
        "steps": trainer.global_step,
    }
    return results, saves.best_model_path


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    whole, _ = learn(folder / "whole")
    _, saved = learn(folder / "parts", max_steps=SAVED)
    resumed, _ = learn(folder / "parts", ckpt_path=saved)
    rank = torch.distributed.get_rank()
    torch.save({"whole": whole, "resumed": resumed}, folder / f"{rank}.pt")
