"""EWC: the penalty that it promises, kept in checkpoints, and of use."""

from functools import partial

import pytorch_lightning as pl
import torch

from benchmarks.baselines import EWC, FineTuning
from lightning_blip import ForgettingCurves, TaskSequenceDataModule
from lightning_blip.fisher import diagonal_fisher
from lightning_blip.metrics import backward_transfer
from tests.networks import QUIET, Net, blobs, pairs


class Boundaries(pl.Callback):
    """Notes the Fisher information and the parameters at every boundary."""

    def __init__(self):
        self.fishers, self.parameters = [], []

    def on_task_end(self, trainer, pl_module, task):
        generator = torch.Generator().manual_seed(task.index)
        batches = trainer.datamodule.train_dataloader()
        self.fishers.append(diagonal_fisher(pl_module, batches, samples=30, generator=generator))
        self.parameters.append({name: x.detach().clone() for name, x in pl_module.named_parameters()})


def learn(*callbacks, folder, net=Net, stream=None, ckpt_path=None, **options):
    torch.manual_seed(0)
    module = net()
    trainer = pl.Trainer(**{**QUIET, **options}, callbacks=list(callbacks), default_root_dir=folder)
    trainer.fit(module, datamodule=stream or pairs(), ckpt_path=ckpt_path)
    return module


def penalty_gradients(ewc, module):
    """What EWC adds to gradients of zero."""
    for theta in module.parameters():
        theta.grad = torch.zeros_like(theta)
    ewc.on_before_optimizer_step(None, module, None)
    return {name: theta.grad for name, theta in module.named_parameters()}


def test_the_gradient_is_that_of_the_penalty(tmp_path):
    ewc, boundaries = EWC(strength=7.0, samples=30), Boundaries()
    module = learn(ewc, boundaries, folder=tmp_path)
    with torch.no_grad():
        for theta in module.parameters():
            theta += 0.1 * torch.randn_like(theta)
    parameters = dict(module.named_parameters())
    penalty = sum(
        7.0 / 2 * (fisher[name] * (theta - boundaries.parameters[-1][name]) ** 2).sum()
        for fisher in boundaries.fishers
        for name, theta in parameters.items()
    )
    expected = torch.autograd.grad(penalty, list(parameters.values()))
    ours = penalty_gradients(ewc, module)
    for name, gradient in zip(parameters, expected, strict=True):
        assert gradient.any()
        torch.testing.assert_close(ours[name], gradient)


def test_the_first_task_is_learned_as_without_it(tmp_path):
    ours, plain = (learn(method, folder=tmp_path, max_epochs=2) for method in (EWC(), FineTuning()))
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_it_keeps_old_tasks_better_than_fine_tuning(tmp_path):
    kept = []
    for method in (EWC(strength=10.0), FineTuning()):
        curves = ForgettingCurves()
        stream = TaskSequenceDataModule.permute_inputs(
            blobs(), blobs(seed=1), tasks=3, epochs_per_task=10, batch_size=16
        )
        net = partial(Net, optimizer=partial(torch.optim.SGD, lr=0.1))
        learn(method, curves, folder=tmp_path, net=net, stream=stream)
        assert curves.matrix.diagonal().min() > 0.95
        kept.append(float(backward_transfer(curves.matrix)))
    assert kept[0] > kept[1] + 0.1


def test_heads_of_tasks_are_left_alone(tmp_path):
    ewc = EWC(strength=100.0)
    module = learn(ewc, net=partial(Net, heads=3), folder=tmp_path)
    with torch.no_grad():
        for theta in module.parameters():
            theta += 0.1
    moved = {name for name, gradient in penalty_gradients(ewc, module).items() if gradient.any()}
    assert moved == {"body.0.weight", "body.0.bias"}


def test_a_resumed_fit_is_as_the_unbroken_one(tmp_path):
    unbroken = learn(EWC(strength=10.0), folder=tmp_path)
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, filename="broken", save_on_train_epoch_end=True)
    options = {"folder": tmp_path, "enable_checkpointing": True}
    learn(EWC(strength=10.0), checkpoint, max_epochs=3, **options)
    resumed = learn(EWC(strength=10.0), ckpt_path=tmp_path / "broken.ckpt", **options)
    torch.testing.assert_close(resumed.state_dict(), unbroken.state_dict(), rtol=0, atol=0)
