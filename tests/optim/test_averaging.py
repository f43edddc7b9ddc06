"""The mean of the weights over the end of a task."""

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from lightning_blip import BLIP, TaskStopping
from lightning_blip.optim.averaging import MeanWeights
from tests.helpers.networks import QUIET, Net, pairs


def test_the_mean_is_of_all_that_training_moves():
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
    mean.put_in_place(network)  # nothing is left to put
    torch.testing.assert_close(
        network[0].weight.detach(), torch.stack([s["0.weight"] for s in states]).mean(0)
    )


class Watch(pl.Callback):
    """Comes after BLIP in a batch, and before it at the end of a task."""

    def __init__(self):
        self.seen = []
        self.pairs = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(pl_module.head.weight.detach().clone())

    def on_task_end(self, trainer, pl_module, task):
        self.pairs.append((self.seen, pl_module.head.weight.detach().clone()))
        self.seen = []


def fit(blip, callbacks, **options):
    module = Net()
    trainer = pl.Trainer(**QUIET, callbacks=[*callbacks, blip], **options)
    trainer.fit(module, datamodule=pairs(epochs_per_task=5))
    return module


def test_a_task_ends_with_the_mean_over_its_last_fifth():
    class Ends(pl.Callback):
        ends = []

        def on_validation_start(self, trainer, pl_module):
            self.ends.append(pl_module.head.weight.detach().clone())

    torch.manual_seed(0)
    watch = Watch()
    # Nothing is frozen or pulled, and every step counts: the mean is that of the last epoch's three states.
    blip = BLIP(prior=1e9, pull=0, every=1)
    fit(blip, [watch, Ends()], num_sanity_val_steps=0, check_val_every_n_epoch=100)
    assert len(watch.pairs) == len(Ends.ends) == 3
    for (seen, last), end in zip(watch.pairs, Ends.ends, strict=True):
        assert torch.equal(last, seen[-1])
        torch.testing.assert_close(end, torch.stack(seen[-3:]).mean(0), atol=2e-6, rtol=0)


@pytest.mark.parametrize("how", ["switched off", "best weights restored"])
def test_the_weights_stay_as_they_are(how):
    class Ends(pl.Callback):
        ends = []

        def on_validation_start(self, trainer, pl_module):
            self.ends.append(pl_module.head.weight.detach().clone())

    torch.manual_seed(0)
    watch, Ends.ends = Watch(), []
    blip = BLIP(prior=1e9, pull=0, average=how != "switched off")
    stopping = [TaskStopping("val_acc", patience=9, mode="max")] if how != "switched off" else []
    fit(blip, [watch, Ends(), *stopping], num_sanity_val_steps=0)
    for (_, last), end in zip(watch.pairs, Ends.ends[5::6], strict=True):
        torch.testing.assert_close(end, last, atol=2e-6, rtol=0)


def test_a_fit_resumed_within_the_averaged_epochs_ends_as_the_unbroken_one(tmp_path):
    def parts():
        torch.manual_seed(1)
        return Net(), BLIP(every=1), pairs(seed=7, epochs_per_task=10)

    whole, blip, tasks = parts()
    checkpoint = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    trainer = pl.Trainer(**{**QUIET, "callbacks": [blip, checkpoint], "enable_checkpointing": True})
    trainer.fit(whole, datamodule=tasks)
    # The last two epochs of ten are averaged, each of three steps; this is the ninth of the second task.
    path = tmp_path / "epoch=18.ckpt"
    assert torch.load(path, weights_only=True)["callbacks"]["BLIP"]["mean"]["count"] == 3
    module, second, tasks = parts()
    pl.Trainer(**QUIET, callbacks=[second]).fit(module, datamodule=tasks, ckpt_path=path)
    for name, value in whole.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name
