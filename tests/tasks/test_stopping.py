"""TaskStopping: a task ends early, with its best weights."""

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from lightning_blip import TaskStopping
from tests.helpers.crash import Crash
from tests.helpers.fitting import fit
from tests.helpers.networks import Net, pairs
from tests.helpers.recorder import Recorder


class Scripted(Net):
    """Logs a given score in each epoch, and adds one to a weight in each epoch."""

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
def test_a_task_ends_after_its_patience_with_its_best_weights(mode):
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
    trainer = fit([Ends(), recorder, stopping], module, tasks, num_sanity_val_steps=0)
    # Task 0 is best in its first epoch and ends after two more, at count 1 again, where task 1 continues.
    assert ends[0] == (0, 2, 1)
    assert tasks.learned == 3
    assert recorder.ends == [0, 1, 2]
    assert trainer.current_epoch == recorder.epochs < 15


def test_without_restoring_a_task_keeps_its_last_weights_and_patience_may_differ_per_task():
    module = Scripted([1.0])
    counts = []

    class Counts(pl.Callback):
        def on_task_end(self, trainer, pl_module, task):
            counts.append(int(pl_module.count))

    stopping = TaskStopping("score", patience=[1, 3, 2], mode="max", restore_best=False)
    fit([Counts(), stopping], module, pairs(epochs_per_task=9))
    assert counts == [2, 6, 9]


def test_the_best_weights_are_restored_if_the_task_ends_with_its_last_epoch():
    module = Scripted([3.0, 2.0])
    fit(TaskStopping("score", patience=9, mode="max"), module, pairs(epochs_per_task=2), max_epochs=2)
    assert int(module.count) == 1


def test_a_resumed_fit_keeps_the_patience_and_the_best_weights(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    scores = [5.0, 4.0, 3.0, 2.0]
    fit(
        [TaskStopping("score", 2, "max"), checkpoint], Scripted(scores), pairs(epochs_per_task=9),
        max_epochs=2, enable_checkpointing=True,
    )  # fmt: skip
    recorder = Recorder()
    module = Scripted(scores)
    fit(
        [TaskStopping("score", 2, "max"), recorder], module, pairs(epochs_per_task=9),
        tmp_path / "last.ckpt", max_epochs=3,
    )  # fmt: skip
    assert recorder.ends == [0]
    assert int(module.count) == 1


def test_a_value_logged_in_training_can_be_monitored():
    recorder = Recorder()
    stopping = TaskStopping("train_loss_epoch", patience=1, min_delta=100.0)
    fit([stopping, recorder], tasks=pairs(epochs_per_task=9))
    assert recorder.epochs == 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TaskStopping("a", patience=-1), "patience=-1"),
        (lambda: TaskStopping("a", patience=[]), r"patience=\[\]"),
        (lambda: TaskStopping("a", mode="best"), "mode='best'"),
        (lambda: fit(TaskStopping("a", [1, 2])), "2 entries for 3 tasks"),
        (lambda: fit(TaskStopping("nothing")), "'nothing' was not logged for task 0, only"),
    ],
)
def test_an_invalid_argument_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_fit_resumed_from_the_checkpoint_of_a_validation_ends_its_tasks_like_the_unbroken_fit(tmp_path):
    def parts():
        torch.manual_seed(1)
        return Scripted([5.0, 4.0, 3.0, 2.0]), Recorder(), TaskStopping("score", 2, "max")

    module, unbroken, stopping = parts()
    fit([unbroken, stopping], module, pairs(epochs_per_task=9))
    for stop in (1, 2, 3):
        module, recorder, stopping = parts()
        saving = ModelCheckpoint(tmp_path / f"{stop}", save_last=True, save_on_train_epoch_end=False)
        with pytest.raises(RuntimeError, match="crash"):
            fit([recorder, stopping, Crash(stop), saving], module, pairs(epochs_per_task=9),
                enable_checkpointing=True)  # fmt: skip
        module, resumed, stopping = parts()
        fit([resumed, stopping], module, pairs(epochs_per_task=9), tmp_path / f"{stop}" / "last.ckpt")
        assert resumed.ends[-3:] == unbroken.ends == [0, 1, 2]
        assert stop + resumed.epochs == unbroken.epochs
