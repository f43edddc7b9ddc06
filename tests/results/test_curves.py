"""ForgettingCurves: R, the record, the table and the picture."""

import csv

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from lightning_blip import BLIP, ForgettingCurves, TaskSequenceDataModule, TaskStopping
from lightning_blip.results.record import RunRecord
from tests.helpers.fitting import fit
from tests.helpers.networks import QUIET, Net, blobs, pairs


def table(folder):
    (path,) = folder.rglob("forgetting.csv")
    with path.open() as lines:
        return list(csv.DictReader(lines))


def accuracy(module, samples):
    x, y = samples.batch(torch.arange(len(samples)))
    with torch.no_grad():
        return (module(x).argmax(1) == y).float().mean().item()


def test_the_matrix_holds_the_scores_of_the_network_after_each_boundary(tmp_path):
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
    fit([BLIP.paper(prior=1e-9), Measure(), curves], tasks=tasks, default_root_dir=tmp_path)
    torch.testing.assert_close(curves.matrix, measured, equal_nan=True)
    assert curves.matrix.isnan().sum() == 3


def test_the_table_has_one_row_per_score(tmp_path):
    curves = ForgettingCurves("val_acc")
    fit(curves, logger=CSVLogger(tmp_path))
    rows = table(tmp_path)
    assert list(rows[0]) == ["step", "epoch", "position", "learning", "task", "score", "boundary"]
    # Two epochs per task, with a validation after each and at the boundary, on one, two, three tasks.
    assert len(rows) == 3 * (1 + 2 + 3)
    boundary = [row for row in rows if row["boundary"] == "1"]
    assert [(row["learning"], row["task"]) for row in boundary] == [
        ("0-1", "0-1"),
        ("2-3", "0-1"), ("2-3", "2-3"),
        ("4-5", "0-1"), ("4-5", "2-3"), ("4-5", "4-5"),
    ]  # fmt: skip
    assert float(boundary[-1]["score"]) == pytest.approx(curves.matrix[2, 2].item())


@pytest.mark.parametrize("tasks", [1, 2, 20])
def test_a_picture_is_drawn_for_few_and_for_many_tasks(tmp_path, tasks):
    stream = TaskSequenceDataModule.permute_inputs(blobs(), blobs(seed=1), tasks=tasks, batch_size=60)
    fit(ForgettingCurves("val_acc"), tasks=stream, default_root_dir=tmp_path)
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
        [checkpoint, ForgettingCurves("val_acc")], max_epochs=3, enable_checkpointing=True,
        default_root_dir=tmp_path / "first",
    )  # fmt: skip
    resumed = ForgettingCurves("val_acc")
    fit(resumed, ckpt_path=tmp_path / "last.ckpt", default_root_dir=tmp_path / "second")
    torch.testing.assert_close(resumed.matrix, whole.matrix, equal_nan=True)
    assert table(tmp_path / "second") == table(tmp_path / "whole")


@pytest.mark.parametrize("step", [9, 12])
def test_a_fit_resumed_from_the_last_step_of_an_epoch_has_the_same_table(tmp_path, step):
    torch.manual_seed(1)
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=step, save_top_k=-1)
    callbacks = [checkpoint, ForgettingCurves("val_acc")]
    fit(callbacks, enable_checkpointing=True, default_root_dir=tmp_path / "whole")
    resumed = ForgettingCurves("val_acc")
    fit(resumed, ckpt_path=tmp_path / f"step={step}.ckpt", default_root_dir=tmp_path / "rest")
    assert table(tmp_path / "rest") == table(tmp_path / "whole")
    assert record(tmp_path / "rest") == record(tmp_path / "whole")


def test_a_checkpoint_written_before_records_existed_is_resumed(tmp_path):
    saving = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    first = ForgettingCurves()
    fit([saving, first], max_epochs=3, enable_checkpointing=True, default_root_dir=tmp_path / "a")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    old = saved["callbacks"]["ForgettingCurves"]
    assert old.keys() == {"matrix", "history", "frozen", "predicted", "ceilings"}
    del old["frozen"], old["predicted"], old["ceilings"]
    for score in old["history"]:
        del score["position"]
    torch.save(saved, tmp_path / "old.ckpt")
    curves = ForgettingCurves()
    fit(
        [BLIP(), curves], ckpt_path=tmp_path / "old.ckpt", logger=TensorBoardLogger(tmp_path),
        default_root_dir=tmp_path,
    )  # fmt: skip
    torch.testing.assert_close(curves.matrix[0], first.matrix[0], equal_nan=True)
    one = RunRecord.read(next((tmp_path / "lightning_logs").rglob("forgetting.json")))
    assert [frozen.task for frozen in one.frozen] == ["2-3", "4-5"]
    assert [(score.learning, score.task) for score in one.scores if score.boundary] == [
        ("0-1", "0-1"),
        ("2-3", "0-1"), ("2-3", "2-3"),
        ("4-5", "0-1"), ("4-5", "2-3"), ("4-5", "4-5"),
    ]  # fmt: skip


def test_a_fit_resumed_with_more_tasks_makes_room_for_them(tmp_path):
    def rotated(*degrees):
        images = torch.utils.data.TensorDataset(torch.rand(24, 1, 4, 4), torch.arange(24) % 6)
        return TaskSequenceDataModule.rotate(images, images, degrees=degrees)

    class FlatNet(Net):
        def forward(self, x):
            return super().forward(x.flatten(1)[:, :8])

    first, more = ForgettingCurves("val_acc"), ForgettingCurves("val_acc")
    trainer = fit(first, FlatNet(), rotated(0, 30), default_root_dir=tmp_path)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    fit(more, FlatNet(), rotated(0, 30, 60), tmp_path / "two.ckpt", default_root_dir=tmp_path)
    torch.testing.assert_close(more.matrix[:2, :2], first.matrix, equal_nan=True)
    assert more.matrix[2].isfinite().all()


def test_the_same_callback_starts_anew_with_a_new_sequence(tmp_path):
    again, once = ForgettingCurves("val_acc"), ForgettingCurves("val_acc")
    fit(again, default_root_dir=tmp_path / "first")
    for curves, folder in ((again, "again"), (once, "once")):
        torch.manual_seed(1)
        fit(curves, default_root_dir=tmp_path / folder)
    torch.testing.assert_close(again.matrix, once.matrix, equal_nan=True)
    assert table(tmp_path / "again") == table(tmp_path / "once")


def test_the_same_callback_continues_with_the_rest_of_a_sequence(tmp_path):
    curves, tasks, module = ForgettingCurves("val_acc"), pairs(), Net()
    fit(curves, module, tasks, max_epochs=3, default_root_dir=tmp_path / "first")
    part = curves.matrix.clone()
    fit(curves, module, tasks, default_root_dir=tmp_path / "rest")
    torch.testing.assert_close(curves.matrix[0], part[0], equal_nan=True)
    assert {row["learning"] for row in table(tmp_path / "rest")} == {"0-1", "2-3", "4-5"}


def test_all_processes_ask_for_the_folder_and_only_one_writes(tmp_path):
    # Lightning broadcasts the folder: if one process does not ask for it, the others wait forever.
    class Process:
        asked = False

        def __init__(self, trainer, is_global_zero):
            self.trainer, self.is_global_zero = trainer, is_global_zero

        def __getattr__(self, name):
            return getattr(self.trainer, name)

        @property
        def log_dir(self):
            self.asked = True
            return tmp_path / "logs"

    curves = ForgettingCurves("val_acc")
    trainer = fit(curves, default_root_dir=tmp_path / "fit")
    other, main = Process(trainer, is_global_zero=False), Process(trainer, is_global_zero=True)
    curves.on_train_end(other, Net())
    assert other.asked
    assert not (tmp_path / "logs").exists()
    curves.on_train_end(main, Net())
    written = {path.name for path in (tmp_path / "logs").iterdir()}
    assert written == {"forgetting.csv", "forgetting.json", "forgetting.png"}


def test_a_fit_with_nan_scores_gets_its_table_and_picture(tmp_path):
    class Diverged(Net):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.log("val_acc", torch.nan)

    curves = ForgettingCurves("val_acc")
    fit(curves, Diverged(), default_root_dir=tmp_path)
    assert {row["score"] for row in table(tmp_path)} == {"nan"}
    assert (tmp_path / "forgetting.png").exists()


def test_validating_outside_a_fit_records_nothing(tmp_path):
    curves = ForgettingCurves("val_acc")
    tasks = pairs()
    trainer = fit(curves, tasks=tasks, default_root_dir=tmp_path)
    before = len(curves.state_dict()["history"])
    assert before == 18
    trainer.validate(trainer.lightning_module, datamodule=tasks, verbose=False)
    loader = torch.utils.data.DataLoader(blobs(), batch_size=60)  # a loader without tasks
    pl.Trainer(**QUIET, callbacks=[curves]).validate(trainer.lightning_module, loader, verbose=False)
    assert len(curves.state_dict()["history"]) == before


def test_a_fit_without_validation_writes_nothing(tmp_path):
    curves = ForgettingCurves("val_acc")
    fit(curves, limit_val_batches=0, default_root_dir=tmp_path)
    assert curves.matrix.isnan().all()
    assert list(tmp_path.rglob("forgetting.*")) == []


def test_the_fit_says_where_table_and_picture_are(tmp_path, caplog):
    with caplog.at_level("INFO"):
        fit(ForgettingCurves("val_acc"), max_epochs=2, default_root_dir=tmp_path)
    shown = [message for message in caplog.messages if message.startswith("Forgetting curves: ")]
    assert shown == [f"Forgetting curves: {tmp_path / 'forgetting.csv'} and {tmp_path / 'forgetting.png'}"]


def test_a_metric_that_is_never_logged_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"'val_accuracy' was not logged for task 0, only \[.*'val_acc'\]"):
        fit(ForgettingCurves("val_accuracy"), default_root_dir=tmp_path)


def test_one_score_logged_for_all_tasks_is_refused(tmp_path):
    class Once(Net):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            pass

        def on_validation_epoch_end(self):
            self.log("val_acc", 0.5)

    with pytest.raises(ValueError, match="'val_acc' was not logged for task 0"):
        fit(ForgettingCurves("val_acc"), Once(), default_root_dir=tmp_path)


def test_a_fit_without_a_sequence_of_tasks_is_refused():
    with pytest.raises(ValueError, match="datamodule=NoneType has no tasks"):
        pl.Trainer(**QUIET, callbacks=[ForgettingCurves()], max_epochs=1).fit(
            Net(), torch.utils.data.DataLoader(blobs(), batch_size=8)
        )


def record(folder):
    (path,) = folder.rglob("forgetting.json")
    return RunRecord.read(path)


@pytest.mark.parametrize("basis", ["diagonal", "kronecker"])
def test_the_record_holds_what_was_measured(tmp_path, basis):
    blip, curves, module = BLIP(basis=basis, prior=1e-5), ForgettingCurves(), Net()
    module.save_hyperparameters({"width": 16})
    reports = []

    class Report(pl.Callback):
        def on_task_end(self, trainer, pl_module, task):
            reports.append((blip.last_boundary.metrics(), blip.bits()))

    fit([blip, Report(), curves], module, default_root_dir=tmp_path)
    one = record(tmp_path)
    torch.testing.assert_close(torch.tensor(one.matrix), curves.matrix, equal_nan=True)
    assert one.tasks == one.seen == ["0-1", "2-3", "4-5"]
    places = [score.position for score in one.scores if score.task == "0-1"]
    assert places == [0.5, 1.0, 1.0, 1.5, 2.0, 2.0, 2.5, 3.0, 3.0]
    assert [score.position for score in one.scores if score.boundary] == [1.0, 2.0, 2.0, 3.0, 3.0, 3.0]
    assert [frozen.task for frozen in one.frozen] == one.tasks
    for frozen, (report, bits) in zip(one.frozen, reports, strict=True):
        assert list(frozen.layers) == ["body.0", "head"]
        assert frozen.used_capacity == report["blip/used_capacity"]
        for name, layer in frozen.layers.items():
            own = torch.cat([values.flatten() for key, values in bits.items() if key.startswith(name)])
            assert layer.values == len(own)
            assert layer.bits == torch.bincount(own, minlength=21).tolist()
            assert layer.used_capacity == pytest.approx(own.double().mean().item() / 20)
            assert layer.information_gain == report[f"blip/information_gain/{name}"]
    assert frozen.used_capacity > 0
    predicted = [point for point in one.predicted if point.position > 1]
    assert [point.position for point in predicted] == [1.5, 2.0, 2.0, 2.5, 3.0, 3.0]
    assert all(point.forgetting > 0 for point in predicted)
    assert one.settings["blip"]["basis"] == basis
    assert one.settings["chosen"] == blip.chosen
    assert one.settings["stream"] == {"tasks": 3, "epochs": [2, 2, 2], "batch_size": 16}
    assert one.settings["hyperparameters"] == {"width": 16}


def test_the_record_is_written_at_each_boundary_also_without_blip(tmp_path):
    found = []

    class Look(pl.Callback):
        def on_task_start(self, trainer, pl_module, task):
            if task.index:
                found.append(record(tmp_path))

    fit([Look(), ForgettingCurves()], default_root_dir=tmp_path)
    assert [len(one.seen) for one in found] == [1, 2]
    assert found[0].frozen == found[0].predicted == []
    assert found[0].settings["blip"] is None


def test_a_task_that_ends_early_ends_at_a_whole_position(tmp_path):
    stopping = TaskStopping("val_acc", patience=1, mode="max", min_delta=1.0)
    fit([stopping, ForgettingCurves()], tasks=pairs(epochs_per_task=10), default_root_dir=tmp_path)
    places = [score.position for score in record(tmp_path).scores if score.task == "0-1"]
    assert places == pytest.approx([0.1, 0.2, 1.0, 1.1, 1.2, 2.0, 2.1, 2.2, 3.0])


def test_validations_within_an_epoch_have_positions_within_the_epoch(tmp_path):
    fit(ForgettingCurves(), val_check_interval=0.5, default_root_dir=tmp_path)
    places = [score.position for score in record(tmp_path).scores if score.task == "0-1"]
    assert places[:7] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0, 1.0])


CEILINGS = [0.5, 2.0, 4.0]


def test_scores_are_divided_by_their_ceilings_also_in_a_resumed_fit(tmp_path):
    plain = ForgettingCurves()
    torch.manual_seed(1)
    fit(plain, default_root_dir=tmp_path / "plain")
    saving = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    torch.manual_seed(1)
    fit(
        [saving, ForgettingCurves(ceilings=CEILINGS)], max_epochs=3, enable_checkpointing=True,
        default_root_dir=tmp_path / "begun",
    )  # fmt: skip
    resumed = ForgettingCurves(ceilings=CEILINGS)
    fit(resumed, ckpt_path=tmp_path / "last.ckpt", default_root_dir=tmp_path / "rest")
    expected = plain.matrix / torch.tensor(CEILINGS)
    torch.testing.assert_close(resumed.matrix, expected, equal_nan=True)
    divided, whole = record(tmp_path / "rest"), record(tmp_path / "plain")
    torch.testing.assert_close(torch.tensor(divided.matrix), expected, equal_nan=True)
    by_task = dict(zip(divided.tasks, CEILINGS, strict=True))
    assert [one.score for one in divided.scores] == pytest.approx(
        [one.score / by_task[one.task] for one in whole.scores]
    )
    assert [float(row["score"]) for row in table(tmp_path / "rest")] == pytest.approx(
        [one.score for one in divided.scores]
    )
    assert (divided.metric, whole.metric) == ("val_acc / ceiling", "val_acc")
    assert (divided.settings["ceilings"], whole.settings["ceilings"]) == (by_task, None)
    for other in (None, [0.5, 2.0, 5.0]):
        with pytest.raises(ValueError, match=r"differ from the checkpoint's \[0.5, 2.0, 4.0\]"):
            fit(ForgettingCurves(ceilings=other), ckpt_path=tmp_path / "last.ckpt")


@pytest.mark.parametrize("ceilings", [[1.0, 0.0, 1.0], [1.0, -2.0, 1.0], [1.0, float("nan"), 1.0]])
def test_ceilings_that_are_not_positive_are_refused(ceilings):
    with pytest.raises(ValueError, match=r"ceilings=\[1.0, .*\] must be positive"):
        ForgettingCurves(ceilings=ceilings)


def test_a_wrong_number_of_ceilings_is_refused():
    with pytest.raises(
        ValueError, match=r"ceilings=\[1.0\] must be one score for each of the 3 tasks: \['0-1"
    ):
        fit(ForgettingCurves(ceilings=[1.0]))
