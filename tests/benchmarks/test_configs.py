"""The YAML files of the streams learn the same as ``python -m benchmarks.run``."""

import inspect
import json
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from benchmarks import run
from benchmarks.plan import PARTS
from benchmarks.protocols import PROTOCOLS
from lightning_blip import BLIP, ForgettingCurves
from lightning_blip.cli import main as cli
from lightning_blip.cli.learning import TaskSequenceCLI

CONFIGS = Path(run.__file__).parent / "configs"
STREAMS = sorted({part.stream for table in ("cpu", "long") for part in PARTS[table]})
OPTIONS = [
    *("--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_checkpointing=false"),
    *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
]


class MadeError(Exception):
    """Raised when the command line has made everything, instead of a fit."""


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def fit(name, data, *options):
    config = str(CONFIGS / f"{name}.yaml")
    cli.main(["fit", "--config", config, "--data.folder", str(data), *OPTIONS, *options])


def made(name, data, monkeypatch, *options):
    """Return the Trainer, module and data module that a command would fit."""

    def note(command, model, datamodule, **rest):
        raise MadeError(command.trainer, model, datamodule)

    monkeypatch.setattr(TaskSequenceCLI, "fit", note, raising=False)
    with pytest.raises(MadeError) as end:
        fit(name, data, *options)
    return end.value.args


def test_every_stream_has_a_file():
    assert sorted(path.stem for path in CONFIGS.iterdir()) == STREAMS


@pytest.mark.parametrize("name", STREAMS)
def test_network_optimizer_and_tasks_equal_those_of_the_protocol(name, data, monkeypatch):
    trainer, module, stream = made(name, data, monkeypatch, "--seed_everything=1", "--data.seed=1")
    protocol = PROTOCOLS[name]
    pl.seed_everything(1, verbose=False)
    expected, network = protocol.stream(data, seed=1), protocol.module()
    assert str(module) == str(network)
    for one, other in zip(module.parameters(), network.parameters(), strict=True):
        assert one.equal(other)
    optimizer, other = module.configure_optimizers(), network.configure_optimizers()
    assert type(optimizer) is type(other)
    assert optimizer.defaults == other.defaults
    assert stream.epochs == [protocol.epochs] * protocol.tasks
    assert [(task.name, task.classes) for task in stream] == [(task.name, task.classes) for task in expected]
    stream.learned = expected.learned = 1
    for one, other in zip(stream.train_dataloader(), expected.train_dataloader(), strict=True):
        assert all(torch.equal(*both) for both in zip(one, other, strict=True))
    (blip,) = (one for one in trainer.callbacks if isinstance(one, BLIP))
    settings = inspect.signature(BLIP).parameters
    assert [getattr(blip, setting) for setting in settings] == [
        getattr(BLIP(), setting) for setting in settings
    ]
    (curves,) = (one for one in trainer.callbacks if isinstance(one, ForgettingCurves))
    assert curves.metric == protocol.metric


@pytest.mark.parametrize(
    ("name", "method"), [("split_fashion", "blip-kronecker"), ("permuted_mnist", "finetune")]
)
def test_a_fit_has_the_scores_of_the_benchmark(name, method, data, tmp_path):
    short = ["--tasks", "2", "--epochs", "2"]
    run.main([name, "--method", method, "--seeds", "1", "--data", str(data), *short])
    (record,) = (tmp_path / "runs").rglob("*.json")
    options = ["--blip=null"] if method == "finetune" else ["--blip.basis=kronecker"]
    fit(name, data, "--data.tasks=2", "--data.epochs_per_task=2", *options)
    R = json.loads((tmp_path / "forgetting.json").read_text())["matrix"]
    measured = json.loads(record.read_text())["R"]
    for learned in range(2):
        for task in range(learned + 1):
            assert 100 * R[learned][task] == pytest.approx(measured[learned][task], abs=1e-3)
