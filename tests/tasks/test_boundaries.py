"""TaskBoundaries and TaskStopping: one fit, many tasks, every boundary crossed once."""

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from lightning_blip import BLIP, TaskBoundaries, TaskStopping
from tests.helpers.networks import QUIET, Net, blobs, pairs


class Recorder(pl.Callback):
    """Writes down what happens, in order."""

    def __init__(self):
        self.events = []

    def on_task_start(self, trainer, pl_module, task):
        self.events.append(("start", task.index))

    def on_task_end(self, trainer, pl_module, task):
        self.events.append(("end", task.index))

    def on_train_epoch_start(self, trainer, pl_module):
        self.events.append(("epoch", trainer.datamodule.task.index))

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.events.append(("validated", trainer.datamodule.task.index, len(trainer.val_dataloaders)))


def fit(tasks, module=None, callbacks=(), ckpt_path=None, **options):
    trainer = pl.Trainer(**{**QUIET, "callbacks": list(callbacks), **options})
    trainer.fit(module or Net(), datamodule=tasks, ckpt_path=ckpt_path)
    return trainer


def test_one_fit_runs_every_task_in_order():
    recorder = Recorder()
    trainer = fit(pairs(epochs_per_task=[1, 2, 1]), callbacks=[recorder], num_sanity_val_steps=0)
    assert recorder.events == [
        ("start", 0), ("epoch", 0), ("validated", 0, 1), ("end", 0), ("validated", 0, 1),
        ("start", 1), ("epoch", 1), ("validated", 1, 2), ("epoch", 1), ("validated", 1, 2),
        ("end", 1), ("validated", 1, 2),
        ("start", 2), ("epoch", 2), ("validated", 2, 3), ("end", 2), ("validated", 2, 3),
    ]  # fmt: skip
    assert trainer.current_epoch == 4
    assert isinstance(trainer.callbacks[0], TaskBoundaries)


def test_the_module_hears_of_tasks_too_and_trains_on_the_right_one():
    class Listening(Net):
        def __init__(self):
            super().__init__()
            self.heard = []
            self.samples = []

        def on_task_start(self, trainer, pl_module, task):
            self.heard.append(task.name)

        def training_step(self, batch, batch_idx):
            self.samples.append((self.trainer.datamodule.task.index, batch[0].mean().item()))
            return super().training_step(batch, batch_idx)

    module = Listening()
    tasks = pairs(epochs_per_task=1, batch_size=40)
    fit(tasks, module)
    assert module.heard == ["0-1", "2-3", "4-5"]
    assert [task for task, _ in module.samples] == [0, 1, 2]
    for task, mean in module.samples:
        assert mean == pytest.approx(tasks[task].train.batch(torch.arange(40))[0].mean().item(), abs=1e-5)


def test_optimizers_and_schedulers_begin_anew_with_each_task():
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

    fit(pairs(), Scheduled(), [Rates()])
    assert Rates.rates == pytest.approx([0.1, 0.05] * 3)
    assert len(made) == 3


def test_a_plateau_scheduler_forgets_the_last_task():
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

    fit(pairs(epochs_per_task=1, batch_size=40), Plateau(), [Best()])
    assert Best.seen == [float("inf")] * 3


def test_gradients_of_one_task_do_not_move_weights_in_the_next():
    class Left(pl.Callback):
        def on_task_start(self, trainer, pl_module, task):
            assert all(theta.grad is None for theta in pl_module.parameters())

    fit(pairs(), callbacks=[Left()], accumulate_grad_batches=2)


@pytest.mark.parametrize(("given", "ran"), [(None, 6), (-1, 6), (3, 3), (50, 6)])
def test_a_smaller_number_of_epochs_stands(given, ran):
    recorder = Recorder()
    trainer = fit(pairs(), callbacks=[recorder], max_epochs=given)
    assert trainer.current_epoch == ran
    assert sum(event[0] == "epoch" for event in recorder.events) == ran


def test_a_second_fit_with_new_tasks_trains_them_and_with_learned_ones_says_so():
    tasks = pairs(epochs_per_task=1)
    trainer = fit(tasks)
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
    trainer = fit(tasks, module)
    assert {(task, head) for stage, task, head in module.seen if stage == "train"} == {(0, 0), (1, 1), (2, 2)}
    assert {(task, head) for stage, task, head in module.seen if stage == "eval"} == {
        (task, head) for task in range(3) for head in range(task + 1)
    }
    module.seen.clear()
    trainer.test(module, datamodule=tasks, verbose=False)
    assert {head for _, _, head in module.seen} == {0, 1, 2}
    assert module.head.active == 2


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("heads", [0, 3])
@pytest.mark.parametrize("stop", range(1, 6))
def test_a_fit_resumed_after_any_epoch_ends_as_the_unbroken_one(tmp_path, stop, heads):
    def parts():
        torch.manual_seed(1)
        return pairs(seed=7), Net(heads, norm=True), BLIP(prior=1e-4), Recorder()

    tasks, whole, blip, unbroken = parts()
    fit(tasks, whole, [blip, unbroken])

    tasks, module, first, recorder = parts()
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    fit(tasks, module, [first, recorder, checkpoint], max_epochs=stop, enable_checkpointing=True)
    tasks, module, second, resumed = parts()
    with torch.no_grad():
        for theta in module.parameters():
            theta.zero_()
    fit(tasks, module, [second, resumed], ckpt_path=tmp_path / "last.ckpt")

    assert same(module.state_dict(), whole.state_dict())
    assert second.tasks_learned == blip.tasks_learned == 3
    assert same(second.bits(), blip.bits())
    assert same(second.precision(), blip.precision())
    ends = [event for event in recorder.events + resumed.events if event[0] == "end"]
    assert ends == [("end", 0), ("end", 1), ("end", 2)]


class Crash(pl.Callback):
    def __init__(self, at):
        self.at = at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == self.at and batch_idx == 1:
            raise RuntimeError("crash")


@pytest.mark.parametrize("at_validation", [False, True])
def test_a_crash_in_the_second_task_loses_no_boundary_and_repeats_none(tmp_path, at_validation):
    torch.manual_seed(1)
    blip, recorder = BLIP(prior=1e-4), Recorder()
    checkpoint = ModelCheckpoint(
        tmp_path, monitor=None, save_last=True, save_top_k=-1, save_on_train_epoch_end=not at_validation
    )
    with pytest.raises(RuntimeError, match="crash"):
        fit(pairs(), Net(), [blip, recorder, Crash(2), checkpoint], enable_checkpointing=True)
    resumed, again = BLIP(prior=1e-4), Recorder()
    tasks = pairs()
    fit(tasks, Net(), [resumed, again], ckpt_path=tmp_path / "last.ckpt")
    assert resumed.tasks_learned == 3
    # A checkpoint saved at the validation before a boundary has not crossed it: the resumed fit does.
    expected = [("end", 0), ("end", 1), ("end", 2)] if at_validation else [("end", 1), ("end", 2)]
    assert [event for event in again.events if event[0] == "end"] == expected
    assert tasks.learned == 3


class Scripted(Net):
    """Logs a score that was decided beforehand, epoch by epoch, and moves one weight by one each epoch."""

    def __init__(self, scores):
        super().__init__()
        self.scores = scores
        self.count = nn.Parameter(torch.zeros(()), requires_grad=False)

    def on_train_epoch_start(self):
        self.count.data += 1

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        current = dataloader_idx == self.trainer.datamodule.task.index
        epoch = max(int(self.count) - 1, 0)
        self.log("score", self.scores[min(epoch, len(self.scores) - 1)] if current else -9.0)


@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_task_ends_early_with_its_own_patience_and_its_best_weights(mode):
    sign = 1.0 if mode == "max" else -1.0
    scores = [5.0, 4.0, 3.0, 1.0, 2.0, 1.5, 1.5, 0.0, 0.1, 0.2, 0.3, 0.4]
    ends = []

    class Ends(pl.Callback):
        def on_task_end(self, trainer, pl_module, task):
            ends.append((task.index, trainer.current_epoch, int(pl_module.count)))

    module = Scripted([sign * score for score in scores])
    stopping = TaskStopping("score", patience=2, mode=mode)
    tasks = pairs(epochs_per_task=5)
    recorder = Recorder()
    trainer = fit(tasks, module, [Ends(), recorder, stopping], num_sanity_val_steps=0)
    # Task 0: best in its first epoch, ended after two more, back at count 1; the script goes on from there.
    assert ends[0] == (0, 2, 1)
    assert tasks.learned == 3
    assert [event for event in recorder.events if event[0] == "end"] == [("end", i) for i in range(3)]
    assert trainer.current_epoch == sum(event[0] == "epoch" for event in recorder.events)
    assert trainer.current_epoch < 15


def test_without_restoring_the_last_weights_stay_and_patience_may_differ_by_task():
    module = Scripted([1.0])
    counts = []

    class Counts(pl.Callback):
        def on_task_end(self, trainer, pl_module, task):
            counts.append(int(pl_module.count))

    stopping = TaskStopping("score", patience=[1, 3, 2], mode="max", restore_best=False)
    fit(pairs(epochs_per_task=9), module, [Counts(), stopping])
    assert counts == [2, 6, 9]


def test_the_best_weights_are_restored_also_where_the_epochs_ran_out():
    module = Scripted([3.0, 2.0])
    fit(pairs(epochs_per_task=2), module, [TaskStopping("score", patience=9, mode="max")], max_epochs=2)
    assert int(module.count) == 1


def test_task_stopping_goes_on_after_a_resume(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    scores = [5.0, 4.0, 3.0, 2.0]
    fit(
        pairs(epochs_per_task=9), Scripted(scores), [TaskStopping("score", 2, "max"), checkpoint],
        max_epochs=2, enable_checkpointing=True,
    )  # fmt: skip
    recorder = Recorder()
    module = Scripted(scores)
    fit(
        pairs(epochs_per_task=9), module, [TaskStopping("score", 2, "max"), recorder],
        ckpt_path=tmp_path / "last.ckpt", max_epochs=3,
    )  # fmt: skip
    assert ("end", 0) in recorder.events
    assert int(module.count) == 1


def test_a_training_metric_can_be_watched():
    recorder = Recorder()
    stopping = TaskStopping("train_loss_epoch", patience=1, min_delta=100.0)
    fit(pairs(epochs_per_task=9), callbacks=[stopping, recorder])
    assert sum(event[0] == "epoch" for event in recorder.events) == 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TaskStopping("a", patience=-1), "patience=-1"),
        (lambda: TaskStopping("a", mode="best"), "mode='best'"),
        (lambda: fit(pairs(), callbacks=[TaskStopping("a", [1, 2])]), "2 entries for 3 tasks"),
        (
            lambda: fit(pairs(), callbacks=[TaskStopping("nothing")]),
            "'nothing' was not logged for task 0, only",
        ),
    ],
)
def test_bad_arguments_get_one_clear_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_validation_step_that_cannot_tell_tasks_apart_is_refused_at_once():
    class Single(Net):
        def validation_step(self, batch, batch_idx):
            pass

    with pytest.raises(ValueError, match=r"Single\.validation_step .* dataloader_idx=0"):
        fit(pairs(), Single())


def test_other_data_modules_are_refused():
    with pytest.raises(ValueError, match="datamodule=NoneType has no tasks"):
        pl.Trainer(**QUIET, callbacks=[TaskBoundaries()], max_epochs=1).fit(
            Net(), torch.utils.data.DataLoader(blobs(), batch_size=8)
        )


def test_a_module_without_validation_trains_through_all_tasks():
    class Blind(Net):
        validation_step = pl.LightningModule.validation_step

    tasks = pairs()
    fit(tasks, Blind())
    assert tasks.learned == 3


def test_task_stopping_goes_on_from_a_checkpoint_of_the_validation(tmp_path):
    def parts():
        torch.manual_seed(1)
        return Scripted([5.0, 4.0, 3.0, 2.0]), Recorder(), TaskStopping("score", 2, "max")

    module, unbroken, stopping = parts()
    fit(pairs(epochs_per_task=9), module, [unbroken, stopping])
    for stop in (1, 2, 3):
        module, recorder, stopping = parts()
        saving = ModelCheckpoint(tmp_path / f"{stop}", save_last=True, save_on_train_epoch_end=False)
        with pytest.raises(RuntimeError, match="crash"):
            fit(pairs(epochs_per_task=9), module, [recorder, stopping, Crash(stop), saving],
                enable_checkpointing=True)  # fmt: skip
        module, resumed, stopping = parts()
        fit(
            pairs(epochs_per_task=9),
            module,
            [resumed, stopping],
            ckpt_path=tmp_path / f"{stop}" / "last.ckpt",
        )
        ends = [event for event in unbroken.events if event[0] == "end"]
        assert [event for event in resumed.events if event[0] == "end"][-3:] == ends
        epochs = sum(event[0] == "epoch" for event in unbroken.events)
        assert stop + sum(event[0] == "epoch" for event in resumed.events) == epochs


def test_a_fit_with_a_planned_schedule_resumed_within_its_first_epoch_ends_as_the_unbroken_one(tmp_path):
    class Planned(Net):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            steps = self.trainer.estimated_stepping_batches
            return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps)]

    def parts():
        torch.manual_seed(1)
        return pairs(batch_size=8, seed=7), Planned()

    tasks, whole = parts()
    fit(tasks, whole)
    tasks, module = parts()
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    with pytest.raises(RuntimeError, match="crash"):
        fit(tasks, module, [saves, Crash(1)], enable_checkpointing=True)
    tasks, module = parts()
    fit(tasks, module, ckpt_path=tmp_path / "epoch=0-step=3.ckpt")
    assert same(module.state_dict(), whole.state_dict())
