"""Lightning's private attributes mean what the functions that use them say, in both packages."""

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_blip.trainer.internals import (
    allows_unused_parameters,
    batch_on_device,
    discard_train_loader,
    discard_val_loaders,
    is_accumulating,
    metric_prefix,
    optimizer_steps,
    reset_plateau,
)
from tests.helpers.networks import QUIET, blobs

PACKAGES = pytest.mark.parametrize("package", [pytorch_lightning, lightning.pytorch])


def learn(package, manual=False, **options):
    """Fit a small module with four batches per epoch, and return the Trainer and what each batch saw."""

    class Net(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = not manual
            self.layers = nn.ModuleList([nn.Linear(8, 6), nn.Linear(8, 6)])
            self.seen = []

        def training_step(self, batch, batch_idx):
            loss = F.cross_entropy(self.layers[0](batch[0]) + self.layers[1](batch[0]), batch[1])
            if manual:
                self.manual_backward(loss)
                for optimizer in self.optimizers():
                    optimizer.step()
                    optimizer.zero_grad()
            return loss

        def validation_step(self, batch, batch_idx):
            pass

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.seen.append((optimizer_steps(self.trainer), is_accumulating(self.trainer)))

        def configure_optimizers(self):
            optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in self.layers]
            return optimizers if manual else optimizers[0]

    class Data(package.LightningDataModule):
        loaded = 0

        def train_dataloader(self):
            self.loaded += 1
            return DataLoader(blobs(32), batch_size=8)

        def val_dataloader(self):
            return DataLoader(blobs(8), batch_size=8)

        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch[0] + 1, batch[1]

    trainer = package.Trainer(**QUIET, max_epochs=1, **options)
    module = Net()
    trainer.fit(module, datamodule=Data())
    return trainer, module.seen


@PACKAGES
def test_steps_are_counted_once_per_batch_with_two_optimizers(package):
    trainer, seen = learn(package, manual=True)
    assert [steps for steps, _ in seen] == [0, 1, 2, 3]
    assert (optimizer_steps(trainer), trainer.global_step) == (4, 8)


@PACKAGES
def test_a_batch_that_takes_no_step_is_accumulating(package):
    _, seen = learn(package, accumulate_grad_batches=3)
    assert seen == [(0, True), (0, True), (0, False), (1, False)]


@PACKAGES
def test_a_discarded_loader_is_asked_for_again(package):
    trainer, _ = learn(package)
    trainer.fit_loop.setup_data()
    assert trainer.datamodule.loaded == 1
    discard_train_loader(trainer)
    trainer.fit_loop.setup_data()
    assert trainer.datamodule.loaded == 2
    assert trainer.val_dataloaders is not None
    discard_val_loaders(trainer)
    assert trainer.val_dataloaders is None


@PACKAGES
def test_a_batch_goes_through_the_hooks_of_the_data_module(package):
    trainer, _ = learn(package)
    inputs, targets = batch_on_device(trainer, (torch.zeros(2), torch.ones(2)))
    assert inputs.tolist() == targets.tolist() == [1, 1]


@PACKAGES
@pytest.mark.parametrize(
    ("strategy", "allowed"), [("auto", True), ("ddp", False), ("ddp_find_unused_parameters_true", True)]
)
def test_only_plain_ddp_needs_a_gradient_of_every_parameter(package, strategy, allowed):
    trainer = package.Trainer(**QUIET, strategy=strategy, devices=1)
    assert allows_unused_parameters(trainer) is allowed


@PACKAGES
def test_the_prefix_of_a_logger_is_that_of_its_metrics(package, tmp_path):
    logger = package.loggers.WandbLogger(save_dir=tmp_path, offline=True, prefix="first")
    assert metric_prefix(logger) == "first-"
    assert metric_prefix(package.loggers.WandbLogger(save_dir=tmp_path, offline=True)) == ""


def test_a_plateau_scheduler_can_be_reset():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    for value in (1.0, 2.0):
        scheduler.step(value)
    reset_plateau(scheduler)
    assert (scheduler.best, scheduler.num_bad_epochs) == (float("inf"), 0)
