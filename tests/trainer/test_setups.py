"""Common set-ups of a Trainer: each trains a small stream and is compared with the plain run."""

from types import SimpleNamespace

import lightning.pytorch
import pytest
import pytorch_lightning
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
)
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_blip import BLIP, ForgettingCurves, TaskHeads, TaskSequenceDataModule
from tests.helpers.networks import QUIET, Net, blobs

BASES = pytest.mark.parametrize("basis", ["diagonal", "kronecker"])
TASKS = 3


def stream(batch_size=8, **options):
    """Return three permutations of 32 points, with four batches per epoch."""
    points, others = blobs(32), blobs(32, seed=1)
    options = {"epochs_per_task": 2, "batch_size": batch_size, **options}
    return TaskSequenceDataModule.permute_inputs(points, others, tasks=TASKS, **options)


def learn(module=Net, basis="diagonal", tasks=None, callbacks=(), package=pytorch_lightning, **options):
    """Learn the stream, and return the weights, bits and curves."""
    torch.manual_seed(0)
    module = module()
    blip, curves = BLIP(basis=basis, pull=3.0, damping=0.2, every=3, samples=64), ForgettingCurves()
    trainer = package.Trainer(**{**QUIET, "callbacks": [blip, curves, *callbacks], **options})
    trainer.fit(module, datamodule=tasks or stream())
    assert blip.tasks_learned == TASKS
    assert curves.matrix.isfinite().sum() == TASKS * (TASKS + 1) // 2
    return SimpleNamespace(
        weights={name: theta.detach() for name, theta in module.named_parameters()},
        bits=blip.bits(), curves=curves.matrix, module=module, blip=blip, trainer=trainer,
    )  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Return the plain run in each basis."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("plain"))
        return {basis: learn(basis=basis) for basis in ("diagonal", "kronecker")}


def assert_same(run, plain, exactly=True):
    """Assert that two runs are equal, exactly or up to the order of sums, which may change a few bits."""
    for (name, theta), other in zip(plain.weights.items(), run.weights.values(), strict=True):
        torch.testing.assert_close(
            other, theta, **({"rtol": 0, "atol": 0} if exactly else TOLERANCE), msg=name
        )
    turned = sum(int((a != b).sum()) for a, b in zip(run.bits.values(), plain.bits.values(), strict=True))
    assert turned <= (0 if exactly else 0.02 * sum(bits.numel() for bits in plain.bits.values()))
    torch.testing.assert_close(run.curves, plain.curves, equal_nan=True)


TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}


def net_of(package):
    """Return a module class that is written for one of the packages."""

    class Small(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
            self.head = TaskHeads(16, classes=[6] * TASKS)

        def forward(self, x):
            return self.head(self.body(x))

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.log(
                "val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean(), batch_size=len(batch[1])
            )

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Small


def test_both_packages_learn_the_same():
    runs = [learn(net_of(package), package=package) for package in (pytorch_lightning, lightning.pytorch)]
    assert_same(*runs)


def test_a_module_of_the_other_package_without_forward_is_refused():
    class Mute(net_of(lightning.pytorch)):
        forward = lightning.pytorch.LightningModule.forward

    with pytest.raises(ValueError, match="Mute has no forward"):
        learn(Mute, package=lightning.pytorch)


def test_the_other_package_resumes_from_a_checkpoint(tmp_path):
    package = lightning.pytorch
    whole = learn(net_of(package), package=package)
    saving = package.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    with pytest.raises(AssertionError):
        learn(net_of(package), package=package, callbacks=[saving], max_epochs=3, enable_checkpointing=True)
    torch.manual_seed(1)
    blip, module = BLIP(pull=3.0, damping=0.2, every=3, samples=64), net_of(package)()
    trainer = package.Trainer(**QUIET, callbacks=[blip, ForgettingCurves()])
    trainer.fit(module, datamodule=stream(), ckpt_path=tmp_path / "last.ckpt")
    assert all(torch.equal(theta, whole.weights[name]) for name, theta in module.named_parameters())


@BASES
def test_accumulating_gradients_over_two_batches_equals_a_batch_of_twice_the_size(basis, plain):
    run = learn(basis=basis, tasks=stream(batch_size=4), accumulate_grad_batches=2)
    assert_same(run, plain[basis], exactly=False)


@BASES
def test_clipping_gradients_changes_the_weights_only_if_they_are_clipped(basis, plain):
    assert_same(learn(basis=basis, gradient_clip_val=1e6), plain[basis])
    clipped = learn(basis=basis, gradient_clip_val=0.01)
    assert not torch.equal(clipped.weights["head.weight"], plain[basis].weights["head.weight"])


@BASES
def test_mixed_precision_keeps_master_weights(basis, plain):
    run = learn(basis=basis, precision="bf16-mixed")
    assert all(theta.dtype == torch.float32 for theta in run.weights.values())
    assert run.curves[TASKS - 1].mean() > plain[basis].curves[TASKS - 1].mean() - 0.1


class ByHand(Net):
    """Manual optimization with one optimizer for each part."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        return [self.make_optimizer(part.parameters()) for part in (self.body, self.head)]


class Groups(Net):
    """One parameter group for each part."""

    def configure_optimizers(self):
        return self.make_optimizer([{"params": part.parameters()} for part in (self.body, self.head)])


class Compiled(Net):
    """A module with a compiled body."""

    def __init__(self):
        super().__init__()
        self.body = torch.compile(self.body)


class LogsUncompiled(Net):
    """A module that can be compiled: ``log`` of Lightning cannot be, so torch.compile skips it."""

    log = torch.compiler.disable(Net.log)


@BASES
@pytest.mark.parametrize("module", [ByHand, Groups])
def test_manual_optimization_and_parameter_groups_take_the_same_steps(module, basis, plain):
    assert_same(learn(module, basis), plain[basis])


@BASES
def test_compiled_parts_and_a_compiled_module_learn_the_same(basis, plain):
    assert_same(learn(Compiled, basis), plain[basis], exactly=False)
    assert_same(learn(lambda: torch.compile(LogsUncompiled()), basis), plain[basis], exactly=False)


def rates(scheduler, **config):
    """Return the learning rates of the steps of each task."""

    class Scheduled(Net):
        def __init__(self):
            super().__init__()
            self.rates = [[] for _ in range(TASKS)]

        def configure_optimizers(self):
            optimizer = self.make_optimizer(self.parameters())
            made = scheduler(optimizer, self.trainer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": made, **config}}

        def training_step(self, batch, batch_idx):
            rate = self.trainer.optimizers[0].param_groups[0]["lr"]
            self.rates[self.trainer.datamodule.task.index].append(rate)
            return super().training_step(batch, batch_idx)

    # The second task is longer: a schedule that ends with the task must know it.
    return learn(Scheduled, tasks=stream(epochs_per_task=[2, 3, 2])).module.rates


@pytest.mark.parametrize(
    ("make", "interval"),
    [
        (lambda optimizer, _: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), "epoch"),
        (lambda optimizer, _: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "step"),
    ],
)
def test_schedules_restart_with_each_task(make, interval):
    first, second, third = rates(make, interval=interval)
    assert len(set(first)) > 1
    assert (len(first), len(second)) == (8, 12)
    assert third == second[:8] == first


def test_planned_schedules_end_with_each_task():
    def one_cycle(optimizer, trainer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, trainer.estimated_stepping_batches)

    first, second, third = rates(one_cycle, interval="step")
    assert (len(first), len(second)) == (8, 12)
    assert third == first
    assert all(task[-1] < 0.01 * max(task) for task in (first, second, third))


def test_a_plateau_schedule_monitors_the_current_task():
    def plateau(optimizer, trainer):
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", patience=0, threshold=2.0)

    # No epoch improves enough: the rate falls after a task's second epoch, and only the second has a third.
    first, second, third = rates(plateau, monitor="val_acc")
    assert first == third == [0.1] * 8
    assert second == pytest.approx([0.1] * 8 + [0.01] * 4)


def test_the_best_weights_of_each_task_are_saved(tmp_path):
    seen = {}

    class Scores(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:  # at a boundary the frozen network's score replaces the first
                task, score = trainer.datamodule.task.index, float(trainer.callback_metrics["val_acc"])
                seen[task, trainer.global_step] = score

    saving = ModelCheckpoint(tmp_path, "{epoch}-{val_acc:.4f}", "val_acc", mode="max", save_top_k=1)
    learn(callbacks=[Scores(), saving], enable_checkpointing=True, tasks=stream(epochs_per_task=4))
    kept = sorted(float(path.stem.split("=")[-1]) for path in tmp_path.glob("*.ckpt"))
    best = sorted(max(score for (task, _), score in seen.items() if task == one) for one in range(TASKS))
    assert kept == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "EarlyStopping",
            {"monitor": "val_acc", "patience": 2, "mode": "max"},
            r"use TaskStopping\(monitor='val_acc', patience=2, mode='max'\) instead",
        ),
        ("StochasticWeightAveraging", {"swa_lrs": 0.1}, "StochasticWeightAveraging would average"),
        ("EMAWeightAveraging", {}, "EMAWeightAveraging would average weights of different tasks"),
    ],
)
def test_callbacks_that_take_the_fit_for_one_task_are_refused(name, options, message):
    if not hasattr(pl.callbacks, name):
        pytest.skip(f"{name} is newer than this version of Lightning")
    with pytest.raises(ValueError, match=message):
        learn(callbacks=[getattr(pl.callbacks, name)(**options)])


def test_sharded_parameters_are_refused():
    with pytest.raises(ValueError, match=r"ModelParallelStrategy .* strategy='ddp'"):
        learn(strategy=ModelParallelStrategy(1, 1))


def test_monitors_and_progress_bars_do_not_change_the_fit(tmp_path, plain):
    watchers = [LearningRateMonitor(), RichProgressBar()]
    run = learn(callbacks=watchers, logger=CSVLogger(tmp_path), enable_progress_bar=True, log_every_n_steps=1)
    assert_same(run, plain["diagonal"])
    assert {name: set(rates) for name, rates in watchers[0].lrs.items()} == {"lr-SGD": {0.1}}


def test_a_data_module_without_tasks_warns_or_is_refused_with_what_to_do():
    class Own(pl.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(blobs(), batch_size=8)

    with pytest.warns(UserWarning, match=r"datamodule=Own has no tasks: .* blip\.consolidate"):
        pl.Trainer(**QUIET, callbacks=[BLIP()], max_epochs=1).fit(Net(), datamodule=Own())
    with pytest.raises(
        ValueError, match=r"datamodule=Own has no tasks: pass .*TaskSequenceDataModule\(\[Task"
    ):
        pl.Trainer(**QUIET, callbacks=[ForgettingCurves()], max_epochs=1).fit(Net(), datamodule=Own())


@pytest.mark.parametrize("package", [pytorch_lightning, lightning.pytorch])
@pytest.mark.parametrize("same_trainer", [True, False])
def test_every_task_is_evaluated_with_its_own_head_and_statistics_after_a_fit(package, same_trainer):
    class Normed(net_of(package)):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU())

        def test_step(self, batch, batch_idx, dataloader_idx=0):
            self.validation_step(batch, batch_idx, dataloader_idx)

        def predict_step(self, batch, batch_idx, dataloader_idx=0):
            return (self(batch[0]).argmax(1) == batch[1]).float()

    run = learn(Normed, package=package)
    tasks = stream()
    options = {**QUIET, "callbacks": [run.blip]}
    trainer = run.trainer if same_trainer else package.Trainer(**options)
    statistics = run.module.body[1].running_mean.clone()
    for results in (trainer.validate(run.module, datamodule=run.trainer.datamodule, verbose=False),
                    trainer.test(run.module, datamodule=tasks, verbose=False)):  # fmt: skip
        scores = [result[f"val_acc/dataloader_idx_{index}"] for index, result in enumerate(results)]
        assert scores == pytest.approx(run.curves[-1].tolist())
    predicted = trainer.predict(run.module, datamodule=tasks)
    assert [float(torch.cat(task).mean()) for task in predicted] == pytest.approx(run.curves[-1].tolist())
    assert run.module.head.active == TASKS - 1
    assert torch.equal(run.module.body[1].running_mean, statistics)
    # Loaders that belong to no task are evaluated with the current head.
    trainer.test(run.module, dataloaders=[DataLoader(blobs(), batch_size=8)] * 2, verbose=False)
    assert run.module.head.active == TASKS - 1
