"""What all states share: the pace of the pull, checks of saved entries, and what is never saved."""

import copy
import pickle
from itertools import pairwise

import pytest
import torch
from torch import nn

from lightning_blip.frozen.base import Collector, Freezing, Pace, Step
from lightning_blip.frozen.checks import check_number, check_tensor
from lightning_blip.frozen.diagonal import DiagonalState
from lightning_blip.frozen.kronecker import KroneckerState


def test_early_in_a_task_pulls_are_due_at_every_step_then_at_a_twentieth_of_the_steps_so_far():
    """Short tasks get enough pulls: the gap is 1 below 20 steps, 2 below 40, and so on, up to ``every``."""
    pace = Pace()
    due = [step for step in range(1, 200) if pace.due(0.1, every=4)]
    gaps = [later - earlier for earlier, later in pairwise(due)]
    assert due[:20] == [*range(1, 20), 21]
    assert [gaps.count(size) for size in (1, 2, 3, 4)] == [18, 10, 6, 35]
    assert max(gaps) == 4


def test_one_pull_makes_up_for_the_learning_rates_of_all_steps_since_the_last():
    pace = Pace(total=1000)
    rates = [pace.due(rate, every=3) for rate in (0.1, 0.2, 0.3, 0.4, 0.5)]
    assert rates == pytest.approx([0, 0, 0.6, 0, 0])
    assert (pace.steps, pace.rate) == (2, pytest.approx(0.9))
    assert pace.collect() == pytest.approx(0.9)
    assert (pace.total, pace.steps, pace.rate) == (1005, 0, 0.0)


def test_the_strength_of_a_pull_is_its_lambda_times_the_accumulated_rate():
    assert Step([], None, pull=3.0, rate=0.5).strength == 1.5
    assert Step([], None, pull=3.0).strength == 0
    assert Step([], None, rate=3.0).strength == 0


def diagonal():
    theta = torch.tensor([0.3, -0.6])
    state = DiagonalState.of(theta, bound=1.0, prior=1e-3)
    state.information = torch.tensor([3.0, 200.0])
    state.freeze(theta, torch.tensor([1, 4]), keep_free_bits=True)
    return state, [theta]


def kronecker():
    theta = torch.tensor([[0.3, -0.6]])
    return KroneckerState.of(theta, bound=1.0, prior=1e-3), [theta]


MAKERS = pytest.mark.parametrize("make", [diagonal, kronecker])


@MAKERS
@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("prior", 0.0), ("prior", -1.0), ("prior", float("nan")), ("prior", float("inf")), ("bound", 0.0),
        ("bound", "wide"), ("tasks", -1), ("tasks", None), ("pace.total", -1), ("pace.steps", -1),
        ("pace.rate", -0.5), ("freezing.max_bits", 0), ("freezing.max_bits", 21),
    ],
)  # fmt: skip
def test_a_damaged_number_is_refused_by_its_name(make, entry, value):
    state, _ = make()
    saved = copy.deepcopy(state.state_dict())
    group, _, name = entry.rpartition(".")
    (saved[group] if group else saved)[name] = value
    if value == float("inf"):  # larger than any number, but a number
        type(state).from_state_dict(saved)
        return
    with pytest.raises(ValueError, match=f"{name}="):
        type(state).from_state_dict(saved)


@MAKERS
def test_the_limits_of_saved_numbers_are_allowed(make):
    state, _ = make()
    saved = copy.deepcopy(state.state_dict())
    saved |= {
        "tasks": 0,
        "prior": torch.finfo(torch.float32).tiny,
        "pace": {"total": 0, "steps": 0, "rate": 0.0},
    }
    for most in (1, 20):
        saved["freezing"]["max_bits"] = most
        if make is kronecker or most == 20:
            assert type(state).from_state_dict(saved).freezing.max_bits == most


@pytest.mark.parametrize(
    "value",
    [torch.zeros(3), torch.zeros(2, dtype=torch.float64), [0.0, 0.0], None, torch.tensor([0.0, float("nan")]),
     torch.tensor([float("inf"), 0.0])],
)  # fmt: skip
def test_a_tensor_of_another_shape_type_or_with_infinite_values_is_refused(value):
    with pytest.raises(ValueError, match="entry"):
        check_tensor({"entry": value}, "entry", [torch.float32], (2,))


def test_the_message_about_a_wrong_tensor_says_what_it_is():
    with pytest.raises(
        ValueError, match=r"torch.float32 of shape \(2,\), and is torch.int32 of shape \(3,\)"
    ):
        check_tensor({"one": torch.zeros(3, dtype=torch.int32)}, "one", [torch.float32], (2,))
    with pytest.raises(ValueError, match="and is 'text'"):
        check_tensor({"one": "text"}, "one", [torch.float32], (2,))


def test_numbers_at_both_ends_of_their_range_are_allowed():
    for value in (1, 2.5, 3):
        check_number({"n": value}, "n", 1, 3)
    for value in (0.99, 3.01, "1"):
        with pytest.raises(ValueError, match=r"n=.* from 1 to 3"):
            check_number({"n": value}, "n", 1, 3)


@MAKERS
def test_a_state_that_was_saved_and_loaded_is_the_same_to_the_last_bit(make):
    state, parameters = make()
    state.tasks, state.pace = 4, Pace(total=45, steps=2, rate=0.25)
    saved = state.state_dict()
    assert "divisor" not in saved
    assert saved["pace"] == {"total": 45, "steps": 2, "rate": 0.25}
    again = type(state).from_state_dict(saved)
    again.locate(parameters)
    assert again.is_located
    assert (again.tasks, again.pace, again.freezing) == (4, state.pace, state.freezing)
    assert (again.prior, again.bound) == (state.prior, state.bound)
    assert torch.equal(again.bits, state.bits)
    assert torch.equal(again.precision, state.precision)


@MAKERS
def test_the_optimizer_of_this_process_is_no_part_of_a_copy(make):
    state, _ = make()
    state.divisor = lambda: None  # cannot be pickled
    copied = pickle.loads(pickle.dumps(state))
    assert copied.divisor is None
    assert copied.state_dict().keys() == state.state_dict().keys()
    assert torch.equal(copied.bits, state.bits)
    assert state.divisor is not None
    assert "divisor" not in repr(state)


@MAKERS
def test_a_new_state_has_learned_nothing(make):
    theta = nn.Parameter(torch.ones(2, 2) / 2)
    state = type(make()[0]).of(theta, bound=1.0, prior=0.25)
    assert state.tasks == 0
    assert not state.informed
    assert state.bits.sum() == 0
    assert (state.precision == 0.25).all()
    assert state.values == state.shape[0] * state.shape[1] == 4
    assert state.strain([theta]) == (0.0, 0)
    assert state.drifted([theta]) == 0
    assert state.immovable() is None


@MAKERS
def test_a_state_moves_to_another_device_with_all_its_tensors(make):
    state, _ = make()
    state.to(torch.device("meta"))
    tensors = [value for value in vars(state).values() if isinstance(value, torch.Tensor)]
    assert tensors
    assert all(one.device.type == "meta" for one in tensors)


def test_a_state_without_restored_parts_is_located_at_once():
    assert kronecker()[0].is_located


def test_by_default_twenty_bits_of_the_exact_rule_are_frozen_in_strict_cells():
    assert Freezing() == Freezing(max_bits=20, rule="exact", cell="strict", rank=None)


def test_a_collector_that_needs_only_squares_has_nothing_to_average():
    class Squares(Collector):
        def information(self, fishers):
            return fishers

    assert Squares().see("weight", None) is None
    assert Squares().finish(10) == []
