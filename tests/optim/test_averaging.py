"""The mean of the weights over the last fifth of a task."""

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from lightning_blip import BLIP, TaskStopping
from lightning_blip.optim.averaging import MeanWeights
from tests.helpers.fitting import fit
from tests.helpers.networks import Net, pairs


def test_the_mean_is_of_all_trained_parameters_and_floating_point_buffers():
    network, mean = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), MeanWeights()
    network[0].bias.requires_grad_(False)
    states = []
    for seed in range(4):
        torch.manual_seed(seed)
        for value in network.state_dict().values():
            value.copy_(torch.randint(9, value.shape))
        states.append({name: value.clone() for name, value in network.state_dict().items()})
        mean.add(network)
    assert mean.count == 4
    mean.put_in_place(network)
    for name, value in network.state_dict().items():
        averaged = name not in ("0.bias", "1.num_batches_tracked")
        expected = torch.stack([state[name] for state in states]).mean(0) if averaged else states[-1][name]
        torch.testing.assert_close(value, expected)


def test_a_mean_that_was_put_in_place_is_forgotten():
    network, mean = nn.Linear(3, 2), MeanWeights()
    mean.add(network)
    mean.put_in_place(network)
    assert mean.count == 0
    network.weight.data.add_(1.0)
    moved = network.weight.detach().clone()
    mean.put_in_place(network)
    assert torch.equal(network.weight, moved)


class HeadWeights(pl.Callback):
    """Records the head's weight; placed before BLIP, so at the end of a task before the mean is put in place.

    Attributes:
        after_steps: For each task, the weight after every step.
        at_task_ends: For each task, the weight before BLIP consolidates it.
        at_validations: The weight at the start of every validation.
    """

    def __init__(self):
        self.after_steps = []
        self.at_task_ends = []
        self.at_validations = []

    def on_task_start(self, trainer, pl_module, task):
        self.after_steps.append([])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after_steps[-1].append(pl_module.head.weight.detach().clone())

    def on_task_end(self, trainer, pl_module, task):
        self.at_task_ends.append(pl_module.head.weight.detach().clone())

    def on_validation_start(self, trainer, pl_module):
        self.at_validations.append(pl_module.head.weight.detach().clone())


def test_a_task_ends_with_the_mean_over_its_last_fifth():
    torch.manual_seed(0)
    weights = HeadWeights()
    # Nothing is frozen or pulled, and every step counts: the mean is that of the last epoch's three steps.
    blip = BLIP(prior=1e9, pull=0, every=1)
    fit(
        [weights, blip],
        tasks=pairs(epochs_per_task=5),
        num_sanity_val_steps=0,
        check_val_every_n_epoch=100,  # so validation runs at boundaries alone
    )
    assert len(weights.at_task_ends) == len(weights.at_validations) == 3
    for steps, last, end in zip(
        weights.after_steps, weights.at_task_ends, weights.at_validations, strict=True
    ):
        assert torch.equal(last, steps[-1])
        mean = torch.stack(steps[-3:]).mean(0)
        torch.testing.assert_close(end, mean, atol=2e-6, rtol=0)
        assert (mean - last).abs().max() > 1e-4


@pytest.mark.parametrize("reason", ["switched off", "best weights restored"])
def test_weights_are_not_averaged_when_switched_off_or_when_the_best_are_restored(reason):
    torch.manual_seed(0)
    weights = HeadWeights()
    blip = BLIP(prior=1e9, pull=0, every=1, average=reason != "switched off")
    stopping = [TaskStopping("val_acc", patience=9, mode="max")] if reason != "switched off" else []
    fit([weights, *stopping, blip], tasks=pairs(epochs_per_task=5), num_sanity_val_steps=0)
    after_boundaries = weights.at_validations[5::6]
    assert len(after_boundaries) == len(weights.at_task_ends) == 3
    for last, end in zip(weights.at_task_ends, after_boundaries, strict=True):
        torch.testing.assert_close(end, last, atol=2e-6, rtol=0)


def test_a_fit_resumed_within_the_averaged_epochs_ends_as_the_unbroken_one(tmp_path):
    def parts():
        torch.manual_seed(1)
        return Net(), BLIP(every=1), pairs(seed=7, epochs_per_task=10)

    whole, blip, tasks = parts()
    checkpoint = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    fit([blip, checkpoint], whole, tasks, enable_checkpointing=True)
    # The last two epochs of ten are averaged, each of three steps; this is the ninth of the second task.
    path = tmp_path / "epoch=18.ckpt"
    assert torch.load(path, weights_only=True)["callbacks"]["BLIP"]["mean"]["count"] == 3
    module, second, tasks = parts()
    fit(second, module, tasks, ckpt_path=path)
    for name, value in whole.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name
