"""A run: the same start for every method, its record, and how it goes on after an interruption."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from benchmarks import learning, run
from benchmarks.protocols import PROTOCOLS
from lightning_blip import TaskHeads
from lightning_blip.metrics import average_score, backward_transfer
from tests.helpers.interruption import interrupt_and_go_on


@pytest.fixture
def runner(data, tmp_path):
    """Return a function that runs two short tasks and returns the records in ``tmp_path``."""

    def main(stream, method, *arguments):
        short = ["--tasks", "2", "--epochs", "1"]
        run.main([stream, "--method", method, "--data", str(data), *short, *arguments])
        return {path.name: json.loads(path.read_text()) for path in (tmp_path / "runs").iterdir()}

    return main


class Witness(pl.Callback):
    """Collects what a run starts from, and scores each task at its end."""

    def __init__(self):
        self.scores, self.first, self.validations = [], [], 0

    def on_fit_start(self, trainer, pl_module):
        self.module = pl_module
        self.first = [theta.detach().clone() for theta in pl_module.parameters()]
        self.tasks = trainer.datamodule.tasks
        self.first += [torch.stack([x for x, _ in task.train]) for task in trainer.datamodule.tasks]

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 0:
            self.first.append(batch[0])

    def on_task_end(self, trainer, pl_module, task):
        x, y = (torch.stack(part) for part in zip(*task.test, strict=True))
        pl_module.eval()
        with torch.no_grad():
            self.scores.append(100 * float((pl_module(x).argmax(1) == y).float().mean()))
        pl_module.train()

    def on_validation_start(self, trainer, pl_module):
        self.validations += 1


@pytest.fixture
def witnesses(monkeypatch):
    """Return the list of witnesses, one per run in order."""
    seen = []
    trainer_of = learning.quiet_trainer

    def witnessed(callbacks, **options):
        seen.append(Witness())
        return trainer_of([*callbacks, seen[-1]], **options)

    monkeypatch.setattr(learning, "quiet_trainer", witnessed)
    return seen


@pytest.mark.parametrize(
    ("stream", "method"), [*((stream, "finetune") for stream in PROTOCOLS), ("permuted_mnist", "blip")]
)
def test_every_stream_is_scored_with_the_weights_after_the_boundary(stream, method, runner, witnesses):
    (record,) = runner(stream, method, "--seeds", "1").values()
    (witness,) = witnesses
    R = torch.tensor([[np.nan if score is None else score for score in row] for row in record["R"]])
    assert R.tril().isfinite().all()
    # A head is not scored before its task.
    assert bool(R[0, 1].isnan()) == isinstance(witness.module.head, TaskHeads) == (record["FWT"] is None)
    assert record["ACC"] == pytest.approx(float(average_score(R)), abs=1e-3)
    assert record["BWT"] == pytest.approx(float(backward_transfer(R)), abs=1e-3)
    assert R.diagonal().tolist() == pytest.approx(witness.scores, abs=1e-3)
    assert witness.validations == 2


def test_a_record_names_the_run(runner):
    records = runner(
        "permuted_mnist", "blip-paper", "--seeds", "2", "--set", "prior=1e-12", "labels=empirical"
    )
    stem = "permuted_mnist-blip-paper-labels=empirical-prior=1e-12-tasks=2-epochs=1"
    assert set(records) == {f"{stem}-seed0.json", f"{stem}-seed1.json"}
    record = records[f"{stem}-seed1.json"]
    assert record["settings"] == {"prior": 1e-12, "labels": "empirical"}
    names = ("stream", "method", "seed", "tasks", "epochs", "torch_version")
    assert {name: record[name] for name in names} == {
        "stream": "permuted_mnist", "method": "blip-paper", "seed": 1, "tasks": 2, "epochs": 1,
        "torch_version": torch.__version__,
    }  # fmt: skip
    assert record["machine"]
    assert record["seconds"] > 0
    first, second = record["used_capacity"]
    assert 0 < first <= second <= 1
    assert record["bytes_per_parameter"] == 6.0


def test_a_run_prints_where_it_is_and_the_mean_over_seeds(runner, capsys):
    records = runner("permuted_mnist", "ewc", "--seeds", "2", "--set", "strength=30")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    where = "permuted_mnist ewc strength=30 tasks=2 epochs=1 seed=0: task 2 of 2, epoch 1 of 1, "
    assert lines[1].startswith(where)
    scores = [record["ACC"] for record in records.values()]
    assert lines[-1].startswith(
        "permuted_mnist, ewc, strength=30, tasks=2, epochs=1, 2 seeds: "
        f"ACC {np.mean(scores):.2f} ± {np.std(scores, ddof=1):.2f} %, BWT "
    )


def test_a_seed_with_a_record_is_not_run_again(runner, witnesses, capsys):
    before = runner("permuted_mnist", "finetune", "--seeds", "1")
    after = runner("permuted_mnist", "finetune", "--seeds", "2")
    assert len(witnesses) == 2  # one for each seed
    assert before.items() < after.items()
    assert "permuted_mnist-finetune-tasks=2-epochs=1-seed0.json is there already" in capsys.readouterr().out


def test_forward_transfer_is_measured_from_the_untrained_network(runner, witnesses):
    (record,) = runner("permuted_mnist", "finetune", "--seeds", "1").values()
    protocol = PROTOCOLS["permuted_mnist"]
    (witness,) = witnesses
    body, head = protocol.module().body, protocol.module().head
    with torch.no_grad():
        for theta, first in zip((*body.parameters(), *head.parameters()), witness.first, strict=False):
            theta.copy_(first)
        x, y = (torch.stack(part) for part in zip(*witness.tasks[1].test, strict=True))
        at_first = 100 * float((head(body(x)).argmax(1) == y).float().mean())
    assert record["FWT"] == pytest.approx(record["R"][0][1] - at_first, abs=1e-3)


@pytest.mark.parametrize("method", ["blip-kronecker", "si"])
def test_an_interrupted_run_goes_on_after_the_last_task(method, data, tmp_path):
    stream = learning.Run(replace(PROTOCOLS["permuted_mnist"], tasks=3, epochs=1), method, {})
    record, before, left, after = interrupt_and_go_on(stream, data, tmp_path, "task 3")
    assert left == [".ckpt"]
    assert len(before) == 3
    assert [share for _, share in after] == [1.0]
    assert "task 3 of 3" in after[0][0]
    unbroken = stream.learn(data, 0)
    changes = {"seconds": 0.0}
    assert replace(record, **changes) == replace(unbroken, **changes)
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_a_diverged_run_leaves_a_note_and_no_record(data, tmp_path):
    usual = PROTOCOLS["split_fashion"]
    protocol = replace(usual, tasks=2, epochs=1, optimizer=partial(torch.optim.SGD, lr=1e38))
    wild = learning.Run(protocol, "finetune", {})
    with pytest.raises(FloatingPointError):
        wild.record(data, tmp_path, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == [wild.diverged(tmp_path, 0).name]


def test_joint_training_scores_every_task_at_the_end(runner):
    (record,) = runner("split_mnist", "joint", "--seeds", "1").values()
    assert record["R"][0] == [None, None]
    assert record["ACC"] == pytest.approx(np.mean(record["R"][1]), abs=1e-3)
    assert record["BWT"] is record["FWT"] is None
    assert record["bytes_per_parameter"] == 0


def test_all_methods_start_from_the_same_weights_samples_and_order(runner, witnesses):
    for method in run.METHODS.keys() - {"joint", "single"}:
        runner("permuted_mnist", method, "--seeds", "2")
    for seed in (0, 1):
        expected, *others = (witness.first for witness in witnesses[seed::2])
        for other in others:
            torch.testing.assert_close(other, expected, rtol=0, atol=0)
    weights = [witness.first[0] for witness in witnesses[:2]]
    assert not weights[0].equal(weights[1])


@pytest.mark.parametrize(
    ("method", "setting", "message"),
    [
        ("finetune", "strength=3", "takes no arguments"),
        ("ewc", "prior=3", "prior"),
        ("ewc", "strength=-1", "must not be negative"),
        ("blip", "rule=other", "must be one of"),
        ("blip", "rule", "rule is not name=value"),
    ],
)
def test_a_setting_that_the_method_does_not_take_is_refused(method, setting, message, runner, capsys):
    with pytest.raises(SystemExit):
        runner("permuted_mnist", method, "--set", setting)
    assert message in capsys.readouterr().err


def test_more_tasks_than_the_data_has_are_refused(data):
    with pytest.raises(ValueError, match="tasks=6 is more than the 5 that this stream has"):
        replace(PROTOCOLS["split_mnist"], tasks=6).stream(data, seed=0)
