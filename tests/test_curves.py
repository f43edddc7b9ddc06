"""ForgettingCurves: the matrix, the logs, the table and the picture."""

import csv

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, WandbLogger

from lightning_blip import BLIP, ForgettingCurves, TaskSequenceDataModule
from lightning_blip.metrics import average_score, backward_transfer, forgetting
from tests.networks import QUIET, Net, blobs, pairs


def fit(curves, tasks=None, module=None, callbacks=(), ckpt_path=None, **options):
    trainer = pl.Trainer(**{**QUIET, "callbacks": [*callbacks, curves], **options})
    trainer.fit(module or Net(), datamodule=tasks or pairs(), ckpt_path=ckpt_path)
    return trainer


def table(folder):
    (path,) = folder.rglob("forgetting.csv")
    with path.open() as lines:
        return list(csv.DictReader(lines))


def accuracy(module, samples):
    x, y = samples.batch(torch.arange(len(samples)))
    with torch.no_grad():
        return (module(x).argmax(1) == y).float().mean().item()


def test_the_matrix_holds_the_scores_of_the_network_as_each_boundary_left_it(tmp_path):
    measured = torch.full((3, 3), torch.nan)

    class Measure(pl.Callback):
        def on_task_start(self, trainer, pl_module, task):
            self.measure(pl_module, task.index - 1)

        def on_train_end(self, trainer, pl_module):
            self.measure(pl_module, 2)

        def measure(self, pl_module, learned):
            pl_module.eval()
            for j in range(learned + 1):
                measured[learned, j] = accuracy(pl_module, tasks[j].val)
            pl_module.train()

    curves, tasks = ForgettingCurves("val_acc"), pairs()
    fit(curves, tasks, callbacks=[BLIP.paper(prior=1e-9), Measure()], default_root_dir=tmp_path)
    torch.testing.assert_close(curves.matrix, measured, equal_nan=True)
    assert curves.matrix.isnan().sum() == 3


def test_every_logger_hears_the_scores_and_the_metrics(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    curves = ForgettingCurves("val_acc")
    loggers = [CSVLogger(tmp_path), WandbLogger(save_dir=tmp_path, project="test")]
    trainer = fit(curves, logger=loggers, log_every_n_steps=1)
    expected = {
        "continual/average_score": average_score(curves.matrix),
        "continual/backward_transfer": backward_transfer(curves.matrix),
        "continual/forgetting": forgetting(curves.matrix),
        "curves/val_acc/0-1": curves.matrix[2, 0],
        "curves/val_acc/4-5": curves.matrix[2, 2],
    }
    summary = dict(trainer.loggers[1].experiment.summary)
    (path,) = tmp_path.rglob("metrics.csv")
    with path.open() as lines:
        rows = list(csv.DictReader(lines))
    for name, value in expected.items():
        assert summary[name] == pytest.approx(float(value), abs=1e-6)
        assert [float(row[name]) for row in rows if row[name]][-1] == pytest.approx(float(value), abs=1e-6)
    assert len([row for row in rows if row["continual/average_score"]]) == 3
    assert len([row for row in rows if row["continual/backward_transfer"]]) == 2
    assert len([row for row in rows if row["curves/val_acc/0-1"]]) == 9
    trainer.loggers[1].experiment.finish()


def test_the_table_has_a_row_for_each_score(tmp_path):
    curves = ForgettingCurves("val_acc")
    fit(curves, logger=CSVLogger(tmp_path))
    rows = table(tmp_path)
    assert list(rows[0]) == ["step", "epoch", "learning", "task", "score", "boundary"]
    # Two epochs a task, validated after each and at the boundary; one, two, three tasks seen.
    assert len(rows) == 3 * (1 + 2 + 3)
    boundary = [row for row in rows if row["boundary"] == "1"]
    assert [(row["learning"], row["task"]) for row in boundary] == [
        ("0-1", "0-1"),
        ("2-3", "0-1"), ("2-3", "2-3"),
        ("4-5", "0-1"), ("4-5", "2-3"), ("4-5", "4-5"),
    ]  # fmt: skip
    assert float(boundary[-1]["score"]) == pytest.approx(curves.matrix[2, 2].item())


@pytest.mark.parametrize("tasks", [1, 2, 20])
def test_the_picture_is_drawn_whatever_the_number_of_tasks(tmp_path, tasks):
    stream = TaskSequenceDataModule.permute_inputs(blobs(), blobs(seed=1), tasks=tasks, batch_size=60)
    fit(ForgettingCurves("val_acc"), stream, default_root_dir=tmp_path)
    picture = (tmp_path / "forgetting.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 5_000


def test_a_resumed_fit_adds_to_the_scores(tmp_path):
    torch.manual_seed(1)
    whole = ForgettingCurves("val_acc")
    fit(whole, default_root_dir=tmp_path / "whole")
    torch.manual_seed(1)
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    fit(
        ForgettingCurves("val_acc"), callbacks=[checkpoint], max_epochs=3, enable_checkpointing=True,
        default_root_dir=tmp_path / "first",
    )  # fmt: skip
    resumed = ForgettingCurves("val_acc")
    fit(resumed, ckpt_path=tmp_path / "last.ckpt", default_root_dir=tmp_path / "second")
    torch.testing.assert_close(resumed.matrix, whole.matrix, equal_nan=True)
    assert table(tmp_path / "second") == table(tmp_path / "whole")


def test_a_fit_resumed_with_more_tasks_makes_room_for_them(tmp_path):
    def rotated(*degrees):
        images = torch.utils.data.TensorDataset(torch.rand(24, 1, 4, 4), torch.arange(24) % 6)
        return TaskSequenceDataModule.rotate(images, images, degrees=degrees)

    class FlatNet(Net):
        def forward(self, x):
            return super().forward(x.flatten(1)[:, :8])

    first, more = ForgettingCurves("val_acc"), ForgettingCurves("val_acc")
    trainer = fit(first, rotated(0, 30), FlatNet(), default_root_dir=tmp_path)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    fit(more, rotated(0, 30, 60), FlatNet(), ckpt_path=tmp_path / "two.ckpt", default_root_dir=tmp_path)
    torch.testing.assert_close(more.matrix[:2, :2], first.matrix, equal_nan=True)
    assert more.matrix[2].isfinite().all()


def test_the_same_callback_starts_afresh_with_a_new_sequence(tmp_path):
    again, once = ForgettingCurves("val_acc"), ForgettingCurves("val_acc")
    fit(again, default_root_dir=tmp_path / "first")
    for curves, folder in ((again, "again"), (once, "once")):
        torch.manual_seed(1)
        fit(curves, default_root_dir=tmp_path / folder)
    torch.testing.assert_close(again.matrix, once.matrix, equal_nan=True)
    assert table(tmp_path / "again") == table(tmp_path / "once")


def test_the_same_callback_goes_on_with_the_rest_of_a_sequence(tmp_path):
    curves, tasks, module = ForgettingCurves("val_acc"), pairs(), Net()
    fit(curves, tasks, module, max_epochs=3, default_root_dir=tmp_path / "first")
    part = curves.matrix.clone()
    fit(curves, tasks, module, default_root_dir=tmp_path / "rest")
    torch.testing.assert_close(curves.matrix[0], part[0], equal_nan=True)
    assert {row["learning"] for row in table(tmp_path / "rest")} == {"0-1", "2-3", "4-5"}


def test_all_processes_ask_for_the_folder_and_one_writes(tmp_path):
    # The folder is broadcast: a process that does not ask leaves the others waiting forever.
    class Process:
        asked = False
        default_root_dir = tmp_path

        def __init__(self, is_global_zero):
            self.is_global_zero = is_global_zero

        @property
        def log_dir(self):
            self.asked = True
            return tmp_path / "logs"

    curves = ForgettingCurves("val_acc")
    fit(curves, default_root_dir=tmp_path / "fit")
    other, main = Process(is_global_zero=False), Process(is_global_zero=True)
    curves.on_train_end(other, Net())
    assert other.asked
    assert not (tmp_path / "logs").exists()
    curves.on_train_end(main, Net())
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {"forgetting.csv", "forgetting.png"}


def test_a_diverged_fit_still_gets_its_table_and_picture(tmp_path):
    class Diverged(Net):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.log("val_acc", torch.nan)

    curves = ForgettingCurves("val_acc")
    fit(curves, module=Diverged(), default_root_dir=tmp_path)
    assert {row["score"] for row in table(tmp_path)} == {"nan"}
    assert (tmp_path / "forgetting.png").exists()


def test_validating_outside_a_fit_records_nothing(tmp_path):
    curves = ForgettingCurves("val_acc")
    tasks = pairs()
    trainer = fit(curves, tasks, default_root_dir=tmp_path)
    before = len(curves.state_dict()["history"])
    trainer.validate(trainer.lightning_module, datamodule=tasks, verbose=False)
    assert len(curves.state_dict()["history"]) == before


def test_a_metric_that_is_never_logged_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"'val_accuracy' was not logged for task 0, only \[.*'val_acc'\]"):
        fit(ForgettingCurves("val_accuracy"), default_root_dir=tmp_path)


def test_a_score_logged_once_for_all_tasks_is_not_taken_for_each(tmp_path):
    class Once(Net):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            pass

        def on_validation_epoch_end(self):
            self.log("val_acc", 0.5)

    with pytest.raises(ValueError, match="'val_acc' was not logged for task 0"):
        fit(ForgettingCurves("val_acc"), module=Once(), default_root_dir=tmp_path)


def test_other_data_modules_are_refused():
    with pytest.raises(ValueError, match="datamodule=NoneType has no tasks"):
        pl.Trainer(**QUIET, callbacks=[ForgettingCurves()], max_epochs=1).fit(
            Net(), torch.utils.data.DataLoader(blobs(), batch_size=8)
        )
