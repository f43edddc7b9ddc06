"""Predicted and measured forgetting: the points are right, and do not change the training."""

import json
import math
import re

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from scipy.stats import rankdata
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks import predicted
from benchmarks.networks import Classifier
from benchmarks.predicted import Comparison, Point
from benchmarks.protocols import PROTOCOLS
from lightning_blip import BLIP, TaskHeads
from lightning_blip.tasks.sequence import sequence
from lightning_blip.tasks.task import MappedDataset, Task


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Write forty images of ten distinct classes."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    labels = np.arange(40) % 10
    images = generator.integers(0, 200, (10, 28, 28))[labels] + generator.integers(0, 56, (40, 28, 28))
    arrays = {f"x_{part}": images.astype(np.uint8) for part in ("train", "test")}
    np.savez(folder / "mnist.npz", **arrays, y_train=labels, y_test=labels)
    return folder


class Witness(pl.Callback):
    """Collects the weights after every step, at the start of every task, and at the end."""

    def __init__(self, blip):
        self.blip = blip
        self.tasks, self.starts, self.steps, self.predictions, self.end = [], [], [], [], {}

    def on_fit_start(self, trainer, pl_module):
        self.tasks = sequence(trainer).tasks

    def on_task_start(self, trainer, pl_module, task):
        self.starts.append(_weights(pl_module))
        self.steps.append([])
        self.predictions.append([])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps[-1].append(_weights(pl_module))
        self.predictions[-1].append(self.blip.predicted_forgetting(pl_module))

    def on_train_end(self, trainer, pl_module):
        self.end = _weights(pl_module)


def _weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.fixture
def witnesses(monkeypatch):
    """Return the list of witnesses, one per fit in order."""
    seen = []
    trainer_of = predicted.quiet_trainer

    def witnessed(callbacks, **options):
        seen.append(Witness(callbacks[-1]))
        return trainer_of([*callbacks, seen[-1]], **options)

    monkeypatch.setattr(predicted, "quiet_trainer", witnessed)
    return seen


@pytest.fixture
def compare(data, tmp_path, capsys):
    """Return a function that runs the command on three short tasks.

    It returns the record, the path of the picture and the last printed line.
    """

    def main(stream, *arguments):
        out = tmp_path / "out"
        predicted.main([stream, "--data", str(data), "--tasks", "3", "--out", str(out), *arguments])
        (record,) = out.glob("*.json")
        (picture,) = out.glob("*.png")
        return json.loads(record.read_text()), picture, capsys.readouterr().out.splitlines()[-1]

    return main


@torch.no_grad()
def _loss(stream, weights, task):
    """Return the cross-entropy on the task's training data, computed per sample."""
    module = PROTOCOLS[stream].network(3)
    network = nn.ModuleDict(dict(zip(("body", "head"), module, strict=True)))
    network.load_state_dict(weights)
    if isinstance(network["head"], TaskHeads):
        network["head"].active = task.index
    total = 0.0
    for index in range(len(task.train)):
        x, y = task.train[index]
        logits = network["head"](network["body"](x)).double()
        total += math.log(float(logits.exp().sum())) - float(logits[y])
    return total / len(task.train)


@pytest.mark.parametrize(
    ("stream", "epochs", "points", "moments"),
    [
        ("permuted_mnist", 2, 3, [3, 6, 8]),  # of 8 steps, one shared head
        ("split_mnist", 3, 3, [1, 2, 3]),  # of 3 steps, a head per task
        ("split_mnist", 2, 5, [1, 2]),  # no more points than steps
    ],
)
def test_points_are_evenly_spaced_and_measure_the_rise_of_the_loss(
    stream, epochs, points, moments, compare, witnesses
):
    record, _, _ = compare(stream, "--epochs", str(epochs), "--points-per-task", str(points))
    (witness,) = witnesses
    names = [task.name for task in witness.tasks]
    taken = [(point["task"], point["share"]) for point in record["points"]]
    assert taken == [(name, moment / moments[-1]) for name in names[1:] for moment in moments]
    at_moments = [(task, moment - 1) for task in (1, 2) for moment in moments]
    for point, (task, step) in zip(record["points"], at_moments, strict=True):
        assert point["predicted"] == witness.predictions[task][step] > 0
        rises = [
            _loss(stream, witness.steps[task][step], past) - _loss(stream, witness.starts[task], past)
            for past in witness.tasks[:task]
        ]
        assert point["measured"] == pytest.approx(np.mean(rises), rel=1e-3, abs=2e-6)
    # The rises are ten times larger than the tolerance.
    assert max(abs(point["measured"]) for point in record["points"]) > 2e-5


def test_the_last_point_has_the_weights_before_blip_averages(compare, witnesses):
    record, _, _ = compare("permuted_mnist", "--epochs", "5", "--points-per-task", "1", "--set", "every=1")
    (witness,) = witnesses
    averaged = witness.starts[2]  # the end of task 1, averaged by BLIP
    rise, as_left = (
        _loss("permuted_mnist", weights, witness.tasks[0])
        - _loss("permuted_mnist", witness.starts[1], witness.tasks[0])
        for weights in (witness.steps[1][-1], averaged)
    )
    assert abs(rise - as_left) > 1e-5
    assert record["points"][0]["measured"] == pytest.approx(rise, abs=2e-6)


def test_the_number_of_points_does_not_change_the_training(compare, witnesses):
    for points in ("1", "8"):
        compare("split_mnist", "--epochs", "8", "--points-per-task", points)
    one, many = (witness.end for witness in witnesses)
    torch.testing.assert_close(one, many, rtol=0, atol=0)


def test_measuring_losses_leaves_the_module_as_it_was():
    body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
    module = Classifier(body, TaskHeads(6, classes=[2, 2]), lambda theta: torch.optim.SGD(theta, lr=0.1))
    x, y = torch.randn(8, 4), torch.arange(8) % 2
    blip = BLIP(norm_stats="per_task")
    blip.consolidate(module, [(x, y)])
    kept = _weights(module)
    module(x + 3)  # the running statistics of the next task
    blip.use_task(module, 1)
    module.training_step((x, y), 0).backward()
    body[2].eval()  # a mode that the user set
    before = _state(module)
    (loss,) = predicted.losses(blip, module, [Task("first", MappedDataset(TensorDataset(x, y)))])
    torch.testing.assert_close(_state(module), before, rtol=0, atol=0)
    module.load_state_dict(kept)
    module.eval()
    module.head.active = 0
    assert loss == pytest.approx(nn.functional.cross_entropy(module(x), y).item(), rel=1e-6)


def _state(module):
    return {
        **_weights(module),
        **{f"{name}.grad": theta.grad for name, theta in module.named_parameters() if theta.grad is not None},
        "random": torch.get_rng_state(),
        "modes": [part.training for part in module.modules()],
        "needed": [theta.requires_grad for theta in module.parameters()],
        "active": module.head.active,
    }


def test_of_many_samples_an_evenly_spaced_subset_is_measured(monkeypatch):
    monkeypatch.setattr(predicted, "_MOST_SAMPLES", 4)
    task = Task("many", MappedDataset(TensorDataset(torch.arange(10.0), torch.arange(10))))
    for _ in range(2):
        x, y = predicted._samples(task)
        assert x.tolist() == y.tolist() == [0, 2, 5, 7]


def test_the_summary_is_printed_saved_and_drawn(compare):
    record, picture, line = compare(
        "permuted_mnist", "--epochs", "2", "--points-per-task", "4", "--seed", "3",
        "--set", "basis=kronecker", "rank=5", "pull=1.5",
    )  # fmt: skip
    expected = {
        "stream": "permuted_mnist", "basis": "kronecker", "seed": 3, "tasks": 3, "epochs": 2,
        "settings": {"basis": "kronecker", "rank": 5, "pull": 1.5}, "torch_version": torch.__version__,
    }  # fmt: skip
    assert {name: record[name] for name in expected} == expected
    assert record["machine"]
    ranks = [rankdata([point[name] for point in record["points"]]) for name in ("predicted", "measured")]
    assert record["correlation"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert line.startswith(
        "permuted_mnist, basis=kronecker, 8 points: "
        f"Spearman's rank correlation {record['correlation']:.2f}, {record['share_within_two']:.0%} of "
    )
    assert (
        picture.stem == "predicted-permuted_mnist-blip-basis=kronecker-pull=1.5-rank=5-tasks=3-epochs=2-seed3"
    )
    assert picture.read_bytes().startswith(b"\x89PNG")


def _comparison(pairs):
    points = [Point(f"task {index // 2}", 1.0, *pair) for index, pair in enumerate(pairs)]
    return Comparison("stream", "diagonal", {}, 0, 3, 1, points, "machine", "2")


def test_correlation_and_share_agree_with_an_example():
    comparison = _comparison([(1.0, -0.1), (2.0, 4.0), (3.0, 1.5), (4.0, 8.5)])
    assert comparison.correlation == pytest.approx(0.8)
    assert comparison.share_within_two == 0.5


def test_the_picture_has_every_point_with_one_colour_per_task():
    pairs = [(1e-3, -2e-3), (2e-3, 1e-3), (0.4, 0.1), (0.1, 0.3)]
    comparison = _comparison(pairs)
    figure = comparison.draw()
    (axes,) = figure.axes
    shown = [tuple(pair) for dots in axes.collections for pair in dots.get_offsets().tolist()]
    assert shown == pairs
    colours = {tuple(dots.get_facecolor()[0]) for dots in axes.collections}
    assert len(colours) == len(axes.collections) == 2
    (line,) = axes.lines
    assert line.get_xydata().tolist() == [[1e-3, 1e-3], [0.4, 0.4]]
    words = re.escape(
        f"stream, basis=diagonal, 4 points: Spearman's rank correlation {comparison.correlation:.2f}"
    )
    assert re.fullmatch(words, figure.get_suptitle())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "basis=other"], "must be one of"),
        (["--set", "strength=3"], "strength"),
        (["--tasks", "1"], "--tasks 1: nothing is forgotten before a second task"),
    ],
)
def test_arguments_that_cannot_be_compared_are_refused(arguments, message, compare, capsys):
    with pytest.raises(SystemExit):
        compare("split_mnist", *arguments)
    assert message in capsys.readouterr().err
