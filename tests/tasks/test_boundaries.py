"""TaskBoundaries: one fit learns many tasks, and crosses every boundary once."""

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_blip import BLIP, TaskBoundaries
from lightning_blip.tasks.sequence import position
from tests.helpers.crash import Crash
from tests.helpers.fitting import fit, same
from tests.helpers.networks import QUIET, Net, blobs, pairs
from tests.helpers.recorder import Recorder


def test_one_fit_runs_every_task_in_order():
    recorder = Recorder()
    trainer = fit(recorder, tasks=pairs(epochs_per_task=[1, 2, 1]), num_sanity_val_steps=0)
    assert recorder.events == [
        ("start", 0), ("epoch", 0), ("validated", 0, 1), ("end", 0), ("validated", 0, 1),
        ("start", 1), ("epoch", 1), ("validated", 1, 2), ("epoch", 1), ("validated", 1, 2),
        ("end", 1), ("validated", 1, 2),
        ("start", 2), ("epoch", 2), ("validated", 2, 3), ("end", 2), ("validated", 2, 3),
    ]  # fmt: skip
    assert trainer.current_epoch == 4
    assert isinstance(trainer.callbacks[0], TaskBoundaries)


def test_the_module_has_the_hooks_too_and_trains_on_the_current_task():
    class Listening(Net):
        def __init__(self):
            super().__init__()
            self.started = []
            self.samples = []

        def on_task_start(self, trainer, pl_module, task):
            self.started.append(task.name)

        def training_step(self, batch, batch_idx):
            self.samples.append((self.trainer.datamodule.task.index, batch[0].mean().item()))
            return super().training_step(batch, batch_idx)

    module = Listening()
    tasks = pairs(epochs_per_task=1, batch_size=40)
    fit(module=module, tasks=tasks)
    assert module.started == ["0-1", "2-3", "4-5"]
    assert [task for task, _ in module.samples] == [0, 1, 2]
    for task, mean in module.samples:
        assert mean == pytest.approx(tasks[task].train.batch(torch.arange(40))[0].mean().item(), abs=1e-5)


def test_optimizers_and_schedulers_restart_with_each_task():
    made = []

    class Scheduled(Net):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            made.append(optimizer)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

    class Rates(pl.Callback):
        rates = []

        def on_train_epoch_start(self, trainer, pl_module):
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

        def on_task_start(self, trainer, pl_module, task):
            assert not trainer.optimizers[0].state

    fit(Rates(), Scheduled())
    assert Rates.rates == pytest.approx([0.1, 0.05] * 3)
    assert len(made) == 3


def test_a_plateau_scheduler_forgets_the_previous_task():
    class Plateau(Net):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=5)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "monitor": "train_loss_epoch"},
            }

    class Best(pl.Callback):
        seen = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.seen.append(trainer.lr_scheduler_configs[0].scheduler.best)

    fit(Best(), Plateau(), pairs(epochs_per_task=1, batch_size=40))
    assert Best.seen == [float("inf")] * 3


def test_gradients_of_one_task_do_not_move_weights_in_the_next():
    class Gradients(pl.Callback):
        left = []

        def on_task_end(self, trainer, pl_module, task):
            self.left.append(any(theta.grad is not None for theta in pl_module.parameters()))

        def on_task_start(self, trainer, pl_module, task):
            assert all(theta.grad is None for theta in pl_module.parameters())

    # Lightning itself removes gradients before a validation.
    fit(Gradients(), limit_val_batches=0)
    assert Gradients.left == [True] * 3


@pytest.mark.parametrize(("given", "ran"), [(None, 6), (-1, 6), (3, 3), (50, 6)])
def test_a_smaller_max_epochs_of_the_user_ends_the_fit_early(given, ran):
    recorder = Recorder()
    trainer = fit(recorder, max_epochs=given)
    assert trainer.current_epoch == ran
    assert recorder.epochs == ran


def test_a_second_fit_learns_new_tasks_and_warns_if_all_are_learned():
    tasks = pairs(epochs_per_task=1)
    trainer = fit(tasks=tasks)
    again = pairs(epochs_per_task=1)
    trainer.fit(trainer.lightning_module, datamodule=again)
    assert again.learned == 3
    assert trainer.current_epoch == 6
    with pytest.warns(UserWarning, match="All 3 tasks of the sequence are learned already"):
        pl.Trainer(**QUIET).fit(trainer.lightning_module, datamodule=tasks)


def test_heads_follow_the_task_in_training_and_the_loader_in_evaluation():
    class Watching(Net):
        seen = []

        def forward(self, x):
            stage = "train" if self.training else "eval"
            self.seen.append((stage, self.trainer.datamodule.task.index, self.head.active))
            return super().forward(x)

    module = Watching(heads=3)
    tasks = pairs(epochs_per_task=1)
    trainer = fit(module=module, tasks=tasks)
    assert {(task, head) for stage, task, head in module.seen if stage == "train"} == {(0, 0), (1, 1), (2, 2)}
    assert {(task, head) for stage, task, head in module.seen if stage == "eval"} == {
        (task, head) for task in range(3) for head in range(task + 1)
    }
    module.seen.clear()
    trainer.test(module, datamodule=tasks, verbose=False)
    assert {head for _, _, head in module.seen} == {0, 1, 2}
    assert module.head.active == 2


@pytest.mark.parametrize("heads", [0, 3])
@pytest.mark.parametrize("stop", range(1, 6))
def test_a_fit_resumed_after_any_epoch_ends_like_the_unbroken_fit(tmp_path, stop, heads):
    def parts():
        torch.manual_seed(1)
        return pairs(seed=7), Net(heads, norm=True), BLIP(prior=1e-4), Recorder()

    tasks, whole, blip, unbroken = parts()
    fit([blip, unbroken], whole, tasks)

    tasks, module, first, recorder = parts()
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    fit([first, recorder, checkpoint], module, tasks, max_epochs=stop, enable_checkpointing=True)
    tasks, module, second, resumed = parts()
    with torch.no_grad():
        for theta in module.parameters():
            theta.zero_()
    fit([second, resumed], module, tasks, tmp_path / "last.ckpt")

    assert same(module.state_dict(), whole.state_dict())
    assert second.tasks_learned == blip.tasks_learned == 3
    assert same(second.bits(), blip.bits())
    assert same(second.precision(), blip.precision())
    assert recorder.ends + resumed.ends == unbroken.ends == [0, 1, 2]


@pytest.mark.parametrize("at_validation", [False, True])
def test_a_crash_in_the_second_task_loses_no_boundary_and_repeats_none(tmp_path, at_validation):
    torch.manual_seed(1)
    blip, recorder = BLIP(prior=1e-4), Recorder()
    checkpoint = ModelCheckpoint(
        tmp_path, monitor=None, save_last=True, save_top_k=-1, save_on_train_epoch_end=not at_validation
    )
    with pytest.raises(RuntimeError, match="crash"):
        fit([blip, recorder, Crash(2), checkpoint], enable_checkpointing=True)
    resumed, again = BLIP(prior=1e-4), Recorder()
    tasks = pairs()
    fit([resumed, again], tasks=tasks, ckpt_path=tmp_path / "last.ckpt")
    assert resumed.tasks_learned == 3
    # A checkpoint saved at the validation before a boundary has not crossed it: the resumed fit does.
    assert again.ends == ([0, 1, 2] if at_validation else [1, 2])
    assert tasks.learned == 3


@pytest.mark.parametrize("task", [0, 1])
def test_a_fit_resumed_from_the_validation_of_a_boundary_ends_like_the_unbroken_fit(tmp_path, task):
    def parts():
        torch.manual_seed(1)
        return Net(), pairs(seed=7), {"check_val_every_n_epoch": 9}

    whole, tasks, options = parts()
    fit((), whole, tasks, **options)
    module, tasks, options = parts()
    # Without validations in between, checkpoints are saved at the validations of the boundaries.
    saves = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=False)
    fit(saves, module, tasks, enable_checkpointing=True, **options)
    path = tmp_path / f"epoch={2 * task + 1}.ckpt"
    assert torch.load(path, weights_only=True)["TaskSequenceDataModule"]["crossing"]
    module, tasks, options = parts()
    recorder = Recorder()
    fit(recorder, module, tasks, path, **options)
    assert recorder.ends == list(range(task + 1, 3))
    assert same(module.state_dict(), whole.state_dict())


def test_a_validation_step_without_dataloader_idx_is_refused_at_the_start():
    class Single(Net):
        def validation_step(self, batch, batch_idx):
            pass

    with pytest.raises(ValueError, match=r"Single\.validation_step .* dataloader_idx=0"):
        fit(module=Single())


def test_data_modules_without_tasks_are_refused():
    with pytest.raises(ValueError, match="datamodule=NoneType has no tasks"):
        pl.Trainer(**QUIET, callbacks=[TaskBoundaries()], max_epochs=1).fit(
            Net(), torch.utils.data.DataLoader(blobs(), batch_size=8)
        )


def test_the_position_grows_evenly_within_each_task():
    class Positions(pl.Callback):
        seen = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.seen.append(position(trainer))

    fit(Positions(), tasks=pairs(epochs_per_task=[2, 1, 1], batch_size=20))
    assert Positions.seen == [0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0]


def test_a_module_without_validation_trains_through_all_tasks():
    class Blind(Net):
        validation_step = pl.LightningModule.validation_step

    tasks = pairs()
    fit(module=Blind(), tasks=tasks)
    assert tasks.learned == 3


def test_a_fit_with_a_planned_schedule_resumed_in_its_first_epoch_ends_like_the_unbroken_fit(tmp_path):
    class Planned(Net):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            steps = self.trainer.estimated_stepping_batches
            return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps)]

    def parts():
        torch.manual_seed(1)
        return Planned(), pairs(batch_size=8, seed=7)

    whole, tasks = parts()
    fit((), whole, tasks)
    module, tasks = parts()
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    with pytest.raises(RuntimeError, match="crash"):
        fit([saves, Crash(1)], module, tasks, enable_checkpointing=True)
    module, tasks = parts()
    fit((), module, tasks, tmp_path / "epoch=0-step=3.ckpt")
    assert same(module.state_dict(), whole.state_dict())
