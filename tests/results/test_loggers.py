"""What ForgettingCurves sends to loggers, read from the files that the loggers wrote."""

import csv
import json
import warnings
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
import wandb
from lightning.pytorch.loggers import WandbLogger as OtherWandbLogger
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from tensorboardX.proto.event_pb2 import Event

from lightning_blip import BLIP, ForgettingCurves
from lightning_blip.metrics import average_score, backward_transfer, forgetting
from lightning_blip.results.record import RunRecord
from tests.helpers import fitting
from tests.helpers.networks import Net
from tests.helpers.offline_run import OfflineRun


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    # A run that another test left open would be continued.
    if wandb.run is not None:
        wandb.run.finish()


class LogsItself(Net):
    """A module that also logs to Weights & Biases itself, on another axis."""

    def training_step(self, batch, batch_idx):
        wandb.log({"mine": batch_idx + 0.5, "own_step": self.global_step})
        return super().training_step(batch, batch_idx)


def fit(loggers, folder, module=Net, curves=None, blip=None, callbacks=(), **options):
    """Run a fit with loggers, and return its record."""
    callbacks = [blip or BLIP(prior=1e-5), curves or ForgettingCurves(), *callbacks]
    torch.manual_seed(0)
    options |= {"logger": loggers, "log_every_n_steps": 2, "default_root_dir": folder}
    trainer = fitting.fit(callbacks, module(), **options)
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger | OtherWandbLogger):
            logger.experiment.finish()
    return RunRecord.read(max(folder.rglob("forgetting.json"), key=lambda path: path.stat().st_mtime_ns))


def check_points(run, record):
    """Assert that a run logged every point of the record, and no other point."""
    for task in record.tasks:
        scores = [one for one in record.scores if one.task == task]
        logged = run.points("forgetting/position", f"forgetting/val_acc/{task}")
        assert logged == [(one.position, pytest.approx(one.score)) for one in scores]
    R = torch.tensor(record.matrix, dtype=torch.float64)
    for name, metric in (
        ("average_score", average_score),
        ("backward_transfer", backward_transfer),
        ("forgetting", forgetting),
    ):
        first = 1 if name == "average_score" else 2
        expected = [
            (float(t), pytest.approx(float(metric(R[:t, :t])), abs=1e-6))
            for t in range(first, len(R) + 1)
        ]  # fmt: skip
        assert run.points("forgetting/position", f"forgetting/{name}") == expected
        assert run.summary[f"forgetting/{name}"] == expected[-1][1]


def table(folder, name):
    """Return the last table of a name."""
    path = max(folder.rglob(f"{name}_*.table.json"), key=lambda path: int(path.name.split("_")[-2]))
    return json.loads(path.read_text())


def test_every_logger_gets_scores_divided_by_their_ceilings(tmp_path):
    ceilings = {"0-1": 0.5, "2-3": 2.0, "4-5": 4.0}
    scores = {}

    class Seen(pl.Callback):
        """Collects the scores that the module itself logged."""

        def on_validation_end(self, trainer, pl_module):
            for index, task in enumerate(trainer.datamodule.tasks[: trainer.datamodule.task.index + 1]):
                name = f"val_acc/dataloader_idx_{index}"
                value = trainer.callback_metrics.get(name, trainer.callback_metrics["val_acc"])
                scores.setdefault(task.name, []).append(float(value))

    makes = [CSVLogger, TensorBoardLogger, partial(WandbLogger, project="test")]
    options = {"callbacks": [Seen()], "num_sanity_val_steps": 0}
    curves = ForgettingCurves(ceilings=list(ceilings.values()))
    record = fit([make(save_dir=tmp_path) for make in makes], tmp_path, curves=curves, **options)
    run = OfflineRun(tmp_path)
    check_points(run, record)
    (path,) = tmp_path.rglob("metrics.csv")
    with path.open() as lines:
        rows = list(csv.DictReader(lines))
    values = list(events(tmp_path))
    for task, ceiling in ceilings.items():
        name, expected = f"forgetting/val_acc/{task}", pytest.approx([one / ceiling for one in scores[task]])
        assert [y for _, y in run.points("forgetting/position", name)] == expected
        assert [float(row[name]) for row in rows if row[name]] == expected
        assert [one.simple_value for one in values if one.tag == name] == expected
    drawn = [score for _, task, score in table(tmp_path, "curves_table")["data"] if task == "0-1"]
    assert sorted(drawn) == pytest.approx(sorted(one / 0.5 for one in scores["0-1"]))
    average = sum(scores[task][-1] / ceiling for task, ceiling in ceilings.items()) / 3
    assert run.summary["forgetting/average_score"] == pytest.approx(average)


@pytest.mark.parametrize("make", [WandbLogger, OtherWandbLogger])
def test_weights_and_biases_draws_every_metric_over_the_position(tmp_path, make):
    logger = make(save_dir=tmp_path, project="test")
    logger.experiment.define_metric("own_step")
    logger.experiment.define_metric("mine", step_metric="own_step")
    record = fit(logger, tmp_path, LogsItself)
    run = OfflineRun(tmp_path)
    check_points(run, record)
    scores = {name: axis for name, axis in run.axes.items() if name.startswith("forgetting/val_acc/")}
    assert scores == {f"forgetting/val_acc/{task}": "forgetting/position" for task in record.tasks}
    assert run.axes["forgetting/average_score"] == "forgetting/position"
    for name in ("predicted_forgetting", "used_capacity", "used_capacity/body.0", "seconds"):
        assert run.axes[f"blip/{name}"] == "blip/position"
        rows = [row for row in run.history if f"blip/{name}" in row]
        assert rows
        assert all("blip/position" in row for row in rows)
    capacity = run.points("blip/position", "blip/used_capacity/body.0")
    assert capacity == [
        (float(t), pytest.approx(one.layers["body.0"].used_capacity))
        for t, one in enumerate(record.frozen, 1)
    ]
    positions = [x for x, _ in run.points("blip/position", "blip/predicted_forgetting")]
    assert positions == sorted(positions)
    assert {1.0, 2.0, 3.0} < set(positions)
    # The axes of the user's metrics, and those of the logger, stay.
    assert run.points("own_step", "mine") == [(step, step % 3 + 0.5) for step in range(18)]
    assert run.axes["mine"] == "own_step"
    assert run.axes["*"] == "trainer/global_step"
    assert len(run.points("trainer/global_step", "train_loss_step")) == 9


def test_weights_and_biases_gets_the_charts(tmp_path):
    record = fit(WandbLogger(save_dir=tmp_path, project="test"), tmp_path)
    run = OfflineRun(tmp_path)
    lines = table(tmp_path, "curves_table")
    assert sorted(map(tuple, lines["data"])) == sorted(
        (one.position, one.task, one.score) for one in record.scores
    )
    R = table(tmp_path, "R")
    assert R["columns"] == ["after learning", *record.tasks]
    assert R["data"] == [
        [task, *(score if learned >= other else None for other, score in enumerate(row))]
        for learned, (task, row) in enumerate(zip(record.tasks, record.matrix, strict=True))
    ]
    shown = [row for row in run.history if "forgetting/matrix/path" in row]
    assert [row["forgetting/position"] for row in shown] == [1.0, 2.0, 3.0]
    for row, frozen in zip(shown, record.frozen, strict=True):
        assert row["blip/bits/head/values"] == frozen.layers["head"].bits
        assert len(list(tmp_path.rglob(row["blip/capacity/path"]))) == 1
        assert len(list(tmp_path.rglob(row["forgetting/matrix/path"]))) == 1


def test_metrics_with_the_prefix_of_the_logger_have_the_same_axis(tmp_path):
    fit(WandbLogger(save_dir=tmp_path, project="test", prefix="mine"), tmp_path)
    run = OfflineRun(tmp_path)
    logged = {name for row in run.history for name in row}
    for name in ("forgetting/average_score", "forgetting/val_acc/0-1", "blip/used_capacity/body.0"):
        assert f"mine-{name}" in logged
        assert run.axes[f"mine-{name}"] == f"mine-{name.partition('/')[0]}/position"
    assert set(run.axes.values()) <= logged | {""}


def test_scores_that_are_not_finite_are_left_out_of_the_table(tmp_path):
    class Diverged(Net):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            super().validation_step(batch, batch_idx, dataloader_idx)
            if self.trainer.datamodule.learned == 2:
                self.log("val_acc", torch.nan)

    record = fit(WandbLogger(save_dir=tmp_path, project="test"), tmp_path, Diverged)
    points = table(tmp_path, "curves_table")["data"]
    assert sorted(map(tuple, points)) == sorted(
        (one.position, one.task, one.score) for one in record.scores if one.learning != "4-5"
    )


def test_a_resumed_run_continues_the_same_charts(tmp_path):
    whole = fit(False, tmp_path / "whole")
    saving = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    options = {"callbacks": [saving], "enable_checkpointing": True}
    fit(WandbLogger(save_dir=tmp_path / "w", project="test", id="one"), tmp_path, max_epochs=3, **options)
    last = str(tmp_path / "last.ckpt")
    record = fit(
        WandbLogger(save_dir=tmp_path / "w", project="test", id="one", resume="allow"),
        tmp_path,
        ckpt_path=last,
    )
    assert record.matrix[2] == whole.matrix[2]
    assert [(one.position, one.task) for one in record.scores] == [
        (one.position, one.task) for one in whole.scores
    ]
    assert len(record.frozen) == 3
    run = OfflineRun(tmp_path / "w")
    check_points(run, record)
    assert len(table(tmp_path / "w", "curves_table")["data"]) == len(record.scores)


def test_the_frozen_state_is_logged_as_an_artifact_on_request(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))  # artifacts that wait to be sent lie here
    blip, curves = BLIP(prior=1e-5), ForgettingCurves(log_frozen_state=True)
    fit(WandbLogger(save_dir=tmp_path, project="test"), tmp_path, blip=blip, curves=curves)
    (artifact,) = [one for one in OfflineRun(tmp_path).artifacts if one.type == "frozen-state"]
    assert json.loads(artifact.metadata) == {
        "tasks": ["0-1", "2-3", "4-5"], "used_capacity": blip.used_capacity, "chosen": blip.chosen
    }  # fmt: skip
    restored = BLIP(prior=1e-5)
    (file,) = artifact.manifest.contents
    assert file.path == "frozen.pt"
    restored.load_state_dict(torch.load(file.local_path, weights_only=True))
    assert fitting.same(restored.bits(), blip.bits())
    assert restored.used_capacity == blip.used_capacity > 0


class Stop(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        raise RuntimeError("stopped before the training")


@pytest.mark.parametrize("missing", ["BLIP", "WandbLogger"])
def test_a_frozen_state_that_cannot_be_logged_is_warned_of_before_the_training(tmp_path, missing):
    logger = WandbLogger(save_dir=tmp_path, project="test") if missing == "BLIP" else CSVLogger(tmp_path)
    blips = [] if missing == "BLIP" else [BLIP()]
    callbacks = [ForgettingCurves(log_frozen_state=True), *blips, Stop()]
    with (
        pytest.warns(UserWarning, match=f"log_frozen_state=True does nothing: .* no {missing}"),
        pytest.raises(RuntimeError, match="stopped before the training"),
    ):
        fitting.fit(callbacks, logger=logger, default_root_dir=tmp_path)
    if missing == "BLIP":
        logger.experiment.finish()


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"max_epochs": 1}])
def test_a_fit_that_logs_no_frozen_state_is_not_warned(tmp_path, options):
    curves = ForgettingCurves(log_frozen_state="fast_dev_run" in options)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        fitting.fit(curves, default_root_dir=tmp_path, **options)
    assert not [one for one in warned if "log_frozen_state" in str(one.message)]


class MLFlowLogger(Logger):
    """A logger with the name of Lightning's, whose client keeps what it is sent."""

    name, version, run_id = "test", 0, "run"

    def __init__(self):
        self.figures, self.metrics = [], []
        self.experiment = self

    def log_figure(self, run_id, figure, artifact_file):
        assert run_id == self.run_id
        self.figures.append(artifact_file)

    def log_metrics(self, metrics, step):
        self.metrics.append(metrics)

    def log_hyperparams(self, params):
        pass


def events(folder):
    """Yield the values in a TensorBoard file, which has lengths and checksums around protobuf events."""
    (path,) = folder.rglob("events.out*")
    data, at = path.read_bytes(), 0
    while at < len(data):
        length = int.from_bytes(data[at : at + 8], "little")
        yield from Event.FromString(data[at + 12 : at + 12 + length]).summary.value
        at += length + 16


def test_several_loggers_get_the_same_scores_and_pictures_if_they_take_pictures(tmp_path):
    flow = MLFlowLogger()
    record = fit([CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "board"), flow], tmp_path)
    (path,) = tmp_path.rglob("metrics.csv")
    with path.open() as lines:
        rows = list(csv.DictReader(lines))
    values = list(events(tmp_path / "board"))
    for task in record.tasks:
        name, expected = f"forgetting/val_acc/{task}", [s.score for s in record.scores if s.task == task]
        assert [float(row[name]) for row in rows if row[name]] == pytest.approx(expected)
        assert [one.simple_value for one in values if one.tag == name] == pytest.approx(expected)
        assert [row[name] for row in flow.metrics if name in row] == pytest.approx(expected)
    places = [float(row["forgetting/position"]) for row in rows if row["forgetting/val_acc/0-1"]]
    assert places == [one.position for one in record.scores if one.task == "0-1"]
    pictures = ["forgetting/curves", "forgetting/matrix", "blip/capacity"]
    assert [one.tag for one in values if one.HasField("image")] == pictures * 3
    assert flow.figures == [f"{name}.png" for name in pictures] * 3


def test_without_blip_no_picture_of_the_capacity_is_sent(tmp_path):
    flow = MLFlowLogger()
    fitting.fit(ForgettingCurves(), logger=flow, default_root_dir=tmp_path)
    assert set(flow.figures) == {"forgetting/curves.png", "forgetting/matrix.png"}
