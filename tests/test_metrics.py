"""The metrics of R, compared with plain loops."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics import MetricCollection

from lightning_blip.metrics import (
    AverageScore,
    BackwardTransfer,
    Forgetting,
    ForwardTransfer,
    average_score,
    backward_transfer,
    forgetting,
    forward_transfer,
)

NAN = float("nan")


@st.composite
def matrices(draw):
    tasks = draw(st.integers(2, 6))
    score = st.floats(-10, 10, width=32)
    rows = draw(st.lists(st.lists(score, min_size=tasks, max_size=tasks), min_size=tasks, max_size=tasks))
    return torch.tensor(rows), draw(st.integers(1, tasks - 1))


@given(matrices())
def test_the_metrics_equal_plain_loops_on_whole_and_on_partial_matrices(case):
    full, t = case
    R = full.clone()
    R[t + 1 :] = NAN  # only the tasks up to t are learned
    r = full.tolist()
    b = [0.25 * j for j in range(len(r))]
    close = {"rel": 1e-4, "abs": 1e-4}
    acc = sum(r[t][j] for j in range(t + 1)) / (t + 1)
    change = sum(r[t][j] - r[j][j] for j in range(t))
    lost = sum(max(r[i][j] for i in range(t)) - r[t][j] for j in range(t)) / t
    ahead = sum(r[j - 1][j] - b[j] for j in range(1, t + 1)) / t
    assert average_score(R).item() == pytest.approx(acc, **close)
    assert backward_transfer(R).item() == pytest.approx(change / t, **close)
    assert backward_transfer(R, over="all").item() == pytest.approx(change / (t + 1), **close)
    assert forgetting(R).item() == pytest.approx(lost, **close)
    assert forward_transfer(R, torch.tensor(b)).item() == pytest.approx(ahead, **close)


def test_only_forward_transfer_needs_scores_above_the_diagonal():
    R = torch.tensor([[0.9, NAN], [0.7, 0.8]])
    assert average_score(R).item() == pytest.approx(0.75)
    assert backward_transfer(R).item() == pytest.approx(-0.2)
    assert forgetting(R).item() == pytest.approx(0.2)
    assert forward_transfer(R, torch.zeros(2)).isnan()


def test_metrics_that_are_undefined_are_nan():
    one = torch.tensor([[0.9, NAN], [NAN, NAN]])
    assert average_score(one).item() == pytest.approx(0.9)
    for value in (backward_transfer(one), forgetting(one), forward_transfer(one, torch.zeros(2))):
        assert value.isnan()
    assert average_score(torch.full((2, 2), NAN)).isnan()
    assert backward_transfer(torch.tensor([[0.9, NAN], [NAN, 0.8]])).isnan()
    assert forgetting(torch.tensor([[NAN, NAN], [0.9, 0.8]])).isnan()


def test_forgetting_is_nan_if_an_earlier_score_is_missing():
    R = torch.tensor([[0.9, NAN, NAN], [NAN, 0.6, NAN], [0.7, 0.6, 0.8]])  # the best on task 0 is unknown
    assert forgetting(R).isnan()
    R[1, 0] = 0.5
    assert forgetting(R).item() == pytest.approx((0.2 + 0.0) / 2)


@pytest.mark.parametrize("convert", [torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.double])
def test_lists_arrays_and_tensors_are_accepted(convert):
    R, baseline = convert(torch.tensor([[0.9, 0.6], [0.7, 0.8]])), convert(torch.tensor([0.5, 0.5]))
    assert average_score(R).item() == pytest.approx(0.75)
    assert backward_transfer(R).item() == pytest.approx(-0.2)
    assert forgetting(R).item() == pytest.approx(0.2)
    assert forward_transfer(R, baseline).item() == pytest.approx(0.1)


def test_integers_become_floats_and_precision_is_kept():
    assert average_score(np.array([[3, 0], [1, 2]])).item() == 1.5
    assert average_score(np.full((1, 1), 0.1)).item() == 0.1
    assert average_score(torch.full((1, 1), 0.5, dtype=torch.bfloat16)).dtype == torch.float32


def test_forgetting_counts_from_the_best_score_and_backward_transfer_from_the_first():
    R = torch.tensor([[0.5, NAN, NAN], [0.9, 0.6, NAN], [0.7, 0.6, 0.8]])
    assert forgetting(R).item() == pytest.approx((0.2 + 0.0) / 2)
    assert backward_transfer(R).item() == pytest.approx((0.2 + 0.0) / 2)


def test_metrics_work_in_a_collection_and_are_cloned_pickled_and_reset():
    scores = [(0, 0, 0.9), (0, 1, 0.6), (1, 0, 0.7), (1, 1, 0.8)]
    metrics = MetricCollection(
        {
            "acc": AverageScore(2),
            "bwt": BackwardTransfer(2),
            "bwt of the paper": BackwardTransfer(2, over="all"),
            "forgetting": Forgetting(2),
            "fwt": ForwardTransfer(2, baseline=torch.tensor([0.5, 0.5])),
        }
    )
    for learned, task, score in scores:
        metrics.update(learned, task, score)
    expected = {"acc": 0.75, "bwt": -0.2, "bwt of the paper": -0.1, "forgetting": 0.2, "fwt": 0.1}
    for copy in (metrics, metrics.clone(), pickle.loads(pickle.dumps(metrics))):
        values = copy.compute()
        assert {name: values[name].item() for name in expected} == pytest.approx(expected)
    assert not metrics["forgetting"].higher_is_better
    assert metrics["acc"].higher_is_better
    metrics.reset()
    assert metrics["acc"].matrix.isnan().all()


def test_forward_returns_the_metric_of_one_score_and_keeps_all_scores():
    metric = AverageScore(2)
    assert metric(0, 0, 0.9).item() == pytest.approx(0.9)
    metric(1, 0, torch.tensor(0.5))
    metric(1, 1, 0.7)
    assert metric.compute().item() == pytest.approx(0.6)


def test_a_task_that_is_scored_again_has_its_last_score():
    by_update, by_forward = AverageScore(2), AverageScore(2)
    for score in (0.4, 0.8):
        by_update.update(0, 0, score)
        assert by_forward(0, 0, score).item() == pytest.approx(score)
    assert by_forward.compute() == by_update.compute()
    assert by_update.compute().item() == pytest.approx(0.8)


def test_the_scores_are_saved_in_the_checkpoint():
    metric, restored = AverageScore(2), AverageScore(2)
    metric.update(0, 0, 0.8)
    restored.load_state_dict(metric.state_dict())
    torch.testing.assert_close(restored.matrix, metric.matrix, equal_nan=True)


def test_the_scores_of_all_processes_are_averaged():
    first, second = AverageScore(2), AverageScore(2)
    first.update(0, 0, 0.8)
    second.update(0, 0, 0.6)
    second.update(1, 0, 0.5)
    second.update(1, 1, 0.9)
    first.sync(dist_sync_fn=lambda matrix, group: [matrix, second.matrix], distributed_available=lambda: True)
    torch.testing.assert_close(first.matrix, torch.tensor([[0.7, NAN], [0.5, 0.9]]), equal_nan=True)
    first.unsync()
    assert first.matrix[0, 0].item() == pytest.approx(0.8)
    assert first.matrix[1].isnan().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: average_score(torch.zeros(2, 3)), r"R of shape \(2, 3\) must be square"),
        (lambda: average_score(torch.zeros(4)), r"R of shape \(4,\) must be square"),
        (lambda: backward_transfer(torch.zeros(2, 2), over="some"), "over='some'"),
        (lambda: forward_transfer(torch.zeros(2, 2), torch.zeros(3)), r"baseline of shape \(3,\)"),
        (lambda: forward_transfer(torch.zeros(2, 3), torch.zeros(3)), r"R of shape \(2, 3\) must be square"),
        (lambda: AverageScore(0), "tasks=0"),
        (lambda: BackwardTransfer(2, over="some"), "over='some'"),
        (lambda: ForwardTransfer(2, baseline=torch.zeros(3)), r"baseline of shape \(3,\)"),
        (lambda: AverageScore(2).update(-1, 0, 0.5), "learned=-1 and task=0 .* 2 tasks, 0 to 1"),
        (lambda: AverageScore(2).update(1, 2, 0.5), "learned=1 and task=2 .* 2 tasks, 0 to 1"),
    ],
)
def test_wrong_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
