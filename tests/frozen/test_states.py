"""The states of both bases by small cases worked out by hand: strain, drift, pull, walls, saving."""

import copy
import math

import pytest
import torch
from torch import nn

from lightning_blip.fisher import diagonal_fisher
from lightning_blip.fisher.factors import Factors
from lightning_blip.frozen.base import Freezing, Step
from lightning_blip.frozen.diagonal import DiagonalInformation, DiagonalState
from lightning_blip.frozen.eigenbasis import add_factor, diagonal_in
from lightning_blip.frozen.kronecker import KroneckerInformation, KroneckerState, as_matrix

# The diagonal basis


def frozen_values(bits, values=(0.25, -0.5, 0.1), max_bits=20, **options):
    theta = torch.tensor(values)
    state = DiagonalState.of(theta, bound=1.0, prior=1.0, max_bits=max_bits, **options)
    state.freeze(theta, torch.tensor(bits), keep_free_bits=True)
    return theta, state


@pytest.mark.parametrize(("cell", "nearest"), [("strict", 2 / 256), ("paper", 2.0**-21)])
def test_before_the_first_task_a_parameter_is_anchored_where_it_is(cell, nearest):
    """To 1/256 of the whole interval in the strict cell, else to half a step of the grid."""
    theta = nn.Parameter(torch.tensor([0.25, -0.7, 0.1]))
    state = DiagonalState.of(theta, bound=1.0, prior=1.0, cell=cell)
    assert ((state.anchor(torch.float32) - theta).abs() <= nearest).all()
    assert not state.packed.requires_grad
    assert not state.gained.requires_grad


def test_damping_adds_a_part_of_the_mean_over_outputs():
    fisher = torch.tensor([[1.0, 0.0], [3.0, 2.0]])
    damped = DiagonalInformation(fisher, is_matrix=True).damped(0.5)
    assert damped.fisher.tolist() == [[2.0, 0.5], [4.0, 2.5]]
    assert damped.is_matrix
    assert torch.equal(damped.coordinates(), damped.fisher)
    vector = DiagonalInformation(fisher)
    assert vector.damped(0.5) is vector


def test_values_at_either_wall_count_unless_no_bit_is_frozen():
    theta, state = frozen_values([1, 3, 3, 3, 0], values=(0.2, 0.2, 0.2, 0.2, 0.2))
    low, high = state.limits(torch.float32)
    moved = torch.stack([low[0], high[1], low[2] - 0.1, theta[3], high[4]])
    assert state.strain([moved]).at_walls == 3


@pytest.mark.parametrize("tasks", [1, 4])
def test_predicted_forgetting_is_half_the_information_times_the_squared_drift_per_task(tasks):
    _, state = frozen_values([0, 0, 0])
    state.prior, state.tasks = 2.0, tasks
    state.information = torch.tensor([1.0, 2.0, 0.0])
    anchor = state.anchor(torch.float32)
    expected = 0.5 * 2.0 * (1.0 * 0.2**2 + 2.0 * 0.3**2) / tasks
    moved = anchor + torch.tensor([0.2, -0.3, 0.7])
    assert state.strain([moved]).forgetting == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("cell", "offset"), [("strict", 1 / 3), ("paper", 0.0)])
def test_frozen_codes_are_the_leading_bits_and_drift_counts_those_that_changed(cell, offset):
    theta, state = frozen_values([2, 3, 0, 1], values=(0.25, -0.5, 0.1, 0.75), cell=cell)
    code = state.frozen_code(theta)
    expected = [math.floor((0.25 + offset) * 4), math.floor((-0.5 + offset) * 8), 0]
    assert code.tolist() == [*expected, math.floor((0.75 + offset) * 2)]
    assert state.drifted([theta]) == 0
    assert state.drifted([theta + torch.tensor([0.5, 0.5, 0.5, 0.0])]) == 2


def test_only_values_with_all_bits_frozen_are_immovable():
    assert frozen_values([5, 4, 0])[1].immovable() is None
    _, state = frozen_values([20, 19, 0])
    assert state.immovable().tolist() == [True, False, False]


def test_freezing_starts_the_pace_of_the_pull_anew_and_counts_the_task():
    theta, state = frozen_values([1, 1, 1])
    state.pace.total = 500
    state.freeze(theta, torch.tensor([1, 1, 1]), keep_free_bits=True)
    assert (state.pace.total, state.tasks) == (0, 2)


def test_one_step_is_pulled_and_projected_by_its_state_alone():
    theta, state = frozen_values([0, 0, 0])
    state.information = torch.full((3,), 7.0)
    anchor = state.anchor(torch.float32)
    moved = theta + 0.1
    expected = anchor + (moved - anchor) / (1 + 3.0 * 0.5 * 7.0)
    state.hold_back(Step([moved], state, pull=3.0, rate=0.5))
    torch.testing.assert_close(moved, expected)


def test_the_exact_rule_gains_from_precision_to_precision():
    theta, state = frozen_values([0, 0, 0])
    gains = [
        state.consolidate([theta], DiagonalInformation(torch.tensor([3.0, 0.0, 15.0]))) for _ in range(2)
    ]
    torch.testing.assert_close(gains[0], torch.tensor([1.0, 0.0, 2.0]))
    torch.testing.assert_close(gains[1], 0.5 * torch.log2(torch.tensor([7 / 4, 1.0, 31 / 16])))
    assert state.bits.tolist() == [1, 0, 2]
    assert state.precision.tolist() == [7.0, 1.0, 31.0]


def test_the_papers_precision_is_the_mean_over_tasks_and_prior():
    theta = torch.tensor([0.3])
    state = DiagonalState.of(theta, bound=1.0, prior=1.0, rule="paper", cell="paper")
    for expected in (8.0, 31 / 3):
        state.consolidate([theta], DiagonalInformation(torch.tensor([15.0])))
        torch.testing.assert_close(state.precision, torch.tensor([expected]), rtol=1e-3, atol=0)


def test_bits_that_follow_from_the_information_are_not_saved():
    theta, state = frozen_values([0, 0, 0])
    state.consolidate([theta], DiagonalInformation(torch.tensor([3.0, 0.0, 15.0])))
    assert state.state_dict()["bits"] is None
    by_hand = frozen_values([3, 7, 0])[1].state_dict()["bits"]
    assert by_hand.tolist() == [3, 7, 0]


def test_a_restored_state_has_its_anchor_only_after_it_saw_the_parameter():
    theta, state = frozen_values([3, 7, 20])
    again = DiagonalState.from_state_dict(state.state_dict())
    assert not again.is_located
    assert torch.equal(again.bits, state.bits)
    with pytest.raises(ValueError, match="locate"):
        _ = again.code
    unlocated = again.state_dict()
    for one in (again, DiagonalState.from_state_dict(unlocated)):
        with pytest.raises(ValueError, match="frozen bits are not those"):
            one.locate([theta + 0.6])
        assert not one.is_located
        one.locate([theta])
        one.locate([theta + 0.6])  # located already: nothing is read any more
        assert torch.equal(one.packed, state.packed)
        assert torch.equal(one.state_dict()["position"], state.state_dict()["position"])


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("gained", torch.zeros(3)), ("position", torch.zeros(3, dtype=torch.int32)), ("checksum", "none"),
        ("position", torch.zeros(2, dtype=torch.uint8)), ("bits", torch.zeros(2, dtype=torch.uint8)),
        ("bits", torch.full((3,), 8, dtype=torch.uint8)), ("gained", torch.full((3,), math.inf).half()),
    ],
)  # fmt: skip
def test_a_damaged_entry_of_a_strict_state_is_refused(entry, value):
    _, state = frozen_values([3, 7, 0], max_bits=7)
    saved = state.state_dict()
    assert torch.equal(DiagonalState.from_state_dict(saved).bits, state.bits)
    saved[entry] = value
    with pytest.raises(ValueError, match=entry):
        DiagonalState.from_state_dict(saved)


def test_checkpoints_of_the_papers_cell_hold_the_code_above_five_bits_of_their_number():
    """This layout may not change: checkpoints of earlier versions are read with it."""
    _, state = frozen_values([3, 20, 0], values=(0.25, -0.5, 0.0), cell="paper")
    packed = state.state_dict()["packed"]
    assert packed.tolist() == [2**18 * 32 + 3, -(2**19) * 32 + 20, 0]


def test_a_damaged_anchor_of_the_papers_cell_is_refused():
    _, state = frozen_values([3, 7, 0], cell="paper")
    saved = state.state_dict()
    assert torch.equal(DiagonalState.from_state_dict(saved).packed, state.packed)
    saved["packed"] = saved["packed"][:2]
    with pytest.raises(ValueError, match="packed"):
        DiagonalState.from_state_dict(saved)


# The eigenbasis


def test_eigenvalues_add_up_over_tasks_and_the_dropped_ones_are_their_mean():
    first = torch.diag(torch.tensor([1.0, 6.0, 3.0]))
    basis, values, rest = add_factor(torch.zeros(3, 0), torch.zeros(0), 0.0, first, rank=1)
    assert (values.tolist(), rest) == ([6.0], 2.0)
    basis, values, rest = add_factor(basis, values, rest, torch.diag(torch.tensor([0.0, 1.0, 4.0])), rank=2)
    # (2, 6, 2) and (0, 1, 4).
    torch.testing.assert_close(values, torch.tensor([7.0, 6.0]))
    assert rest == pytest.approx(2.0)
    torch.testing.assert_close(basis.abs(), torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    whole = add_factor(torch.zeros(3, 0), torch.zeros(0), 0.0, first, rank=None)
    assert (whole[1].tolist(), whole[2]) == ([6.0, 3.0, 1.0], 0.0)


def test_rounding_makes_no_eigenvalue_negative():
    vector = torch.randn(6, 1, generator=torch.Generator().manual_seed(0))
    _, values, _ = add_factor(torch.zeros(6, 0), torch.zeros(0), 0.0, vector @ vector.T, rank=None)
    assert (values >= 0).all()


def test_the_diagonal_in_another_basis_is_that_of_the_whole_matrix():
    generator = torch.Generator().manual_seed(0)
    basis, new = (torch.linalg.qr(torch.randn(5, 5, generator=generator).double()).Q[:, :k] for k in (2, 3))
    values, rest = torch.tensor([7.0, 4.0]).double(), 1.5
    whole = rest * torch.eye(5).double() + basis * (values - rest) @ basis.T
    torch.testing.assert_close(diagonal_in(basis, values, rest, new), (new.T @ whole @ new).diagonal())


# The Kronecker basis


def layer_state(alpha=(15.0, 3.0), gamma=(1.0,), prior=1.0, rank=None, dtype=torch.float32):
    """A layer whose coordinates are its own values: (out, in), A and G diagonal."""
    theta = torch.full((len(gamma), len(alpha)), 0.5, dtype=dtype)
    state = KroneckerState.of(theta, bound=1.0, prior=prior, rank=rank)
    factors = Factors(torch.diag(torch.tensor(alpha)).to(dtype), torch.diag(torch.tensor(gamma)).to(dtype))
    state.consolidate([theta], KroneckerInformation(factors))
    return theta, state


def test_damping_adds_a_part_of_the_mean_to_the_diagonal_of_the_outputs_factor():
    A, G = torch.eye(2), torch.tensor([[1.0, 0.5], [0.5, 3.0]])
    damped = KroneckerInformation(Factors(A, G)).damped(0.5).factors
    assert damped.G.tolist() == [[2.0, 0.5], [0.5, 4.0]]
    assert damped.A is A


def test_coordinates_of_the_information_are_the_products_of_eigenvalues():
    information = KroneckerInformation(Factors(torch.diag(torch.tensor([1.0, 4.0])), 3.0 * torch.eye(1)))
    assert information.coordinates().tolist() == [[3.0, 12.0]]


def test_cells_are_the_bound_over_a_power_of_two_and_infinite_without_frozen_bits():
    _, state = layer_state(alpha=(15.0, 3.0, 0.5))
    assert state.bits.tolist() == [[2, 1, 0]]
    assert state.width.tolist() == [[0.25, 0.5, math.inf]]
    assert state.precision.tolist() == [[16.0, 4.0, 1.5]]


@pytest.mark.parametrize(("rate", "divided"), [(0.5, None), (0.5, 2.0), (0.5, 0.1), (0.0, None)])
def test_a_layer_is_held_back_only_where_a_pull_is_due(rate, divided):
    """P is the root mean square over the weight; a bias has the same."""
    weight, bias = torch.full((1, 2), 0.5), torch.zeros(1)
    state = KroneckerState.create([weight, bias], 4.0, 100.0, Freezing())
    state.hold_back(Step([weight + 9.0, bias], state, pull=3.0, rate=1.0))  # before the first task
    factors = Factors(7.0 * torch.eye(3), torch.eye(1))
    state.consolidate([weight, bias], KroneckerInformation(factors))
    weight, bias = weight + 1.0, bias - 2.0
    P = None if divided is None else divided * torch.tensor([[1.0, 7.0**0.5]])  # mean of squares 4
    state.hold_back(Step([weight, bias], state, pull=3.0, rate=rate, divisor=P))
    mean = 1.0 if divided is None else 2.0 * divided
    kept = 1 / (1 + 3.0 * rate * 7.0 / mean)
    torch.testing.assert_close(weight, torch.full((1, 2), 0.5 + kept))
    torch.testing.assert_close(bias, torch.tensor([-2.0 * kept]))


def test_before_the_first_task_a_layer_has_neither_walls_nor_pull():
    weight = torch.full((1, 2), 0.5)
    state = KroneckerState.of(weight, bound=1.0, prior=1.0)
    moved = weight + 30.0
    state.hold_back(Step([moved], state, pull=3.0, rate=1.0))
    state.settle([moved])
    assert torch.equal(moved, weight + 30.0)


def test_coordinates_at_or_beyond_their_walls_are_counted_and_put_back():
    theta, state = layer_state(alpha=(15.0, 15.0, 15.0, 0.0))
    moved = theta + torch.tensor([[0.25, -0.3, 0.2, 5.0]])
    assert state.strain([moved]).at_walls == 2
    assert state.drifted([moved]) == 1
    state.settle([moved])
    torch.testing.assert_close(moved, theta + torch.tensor([[0.25, -0.25, 0.2, 5.0]]))
    assert state.drifted([moved]) == 0


def test_a_rounding_error_at_a_wall_is_no_drift():
    theta, state = layer_state(alpha=(15.0, 15.0))
    assert state.drifted([theta + torch.tensor([[0.25 + 1e-7, 0.1]])]) == 0
    assert state.drifted([theta + torch.tensor([[0.25 + 1e-5, 0.1]])]) == 1


def test_consolidating_a_layer_starts_the_pace_anew_and_anchors_a_copy():
    theta, state = layer_state()
    state.pace.total = 500
    state.consolidate([theta], KroneckerInformation(Factors(torch.eye(2), torch.eye(1))))
    assert (state.pace.total, state.tasks) == (0, 2)
    theta += 1.0
    assert state.anchor.tolist() == [[0.5, 0.5]]


def test_a_tiny_information_is_pulled_by_a_huge_strength():
    theta, state = layer_state(alpha=(1e-9, 1e-12), gamma=(1.0, 1e-3), dtype=torch.float64)
    held = state.held_back(theta + 1.0, strength=1e12)
    expected = 1 / (1 + 1e12 * torch.outer(torch.tensor([1.0, 1e-3]), torch.tensor([1e-9, 1e-12])).double())
    torch.testing.assert_close(held - theta, expected)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("anchor", torch.full((1, 2), math.nan)), ("anchor", torch.zeros(1, 2, dtype=torch.int32)),
        ("input_values", torch.zeros(2, dtype=torch.int32)), ("input_basis", torch.zeros(3, 2)),
        ("output_basis", torch.zeros(1, 2)), ("output_values", torch.zeros(1, 1)), ("input_rest", -1.0),
        ("output_rest", math.nan),
    ],
)  # fmt: skip
def test_a_damaged_entry_of_a_layer_is_refused(entry, value):
    _, state = layer_state()
    saved = copy.deepcopy(state.state_dict())
    again = KroneckerState.from_state_dict(saved)
    assert torch.equal(again.precision, state.precision)
    saved[entry] = value
    with pytest.raises(ValueError, match=entry.partition("_")[0]):
        KroneckerState.from_state_dict(saved)


def test_a_layer_is_the_matrix_of_its_weight_with_the_bias_as_the_last_column():
    convolution = nn.Conv2d(2, 3, 2)
    matrix = as_matrix([convolution.weight, convolution.bias])
    assert matrix.shape == KroneckerState.shape_of([convolution.weight, convolution.bias]) == (3, 9)
    assert torch.equal(matrix[:, -1], convolution.bias.detach())
    assert KroneckerState.shape_of([convolution.weight]) == (3, 8)
    assert not matrix.requires_grad


def test_a_layer_without_a_bias_is_its_weight_alone():
    names = {"weight"}
    layer = nn.Linear(2, 1, bias=False)
    assert KroneckerState.claim(layer, names) == [("weight",)]
    assert KroneckerState.shape_of([layer.weight]) == (1, 2)
    state = KroneckerState.create([layer.weight], 1.0, 1.0, Freezing())
    collector = state.observe(["weight"], True)
    diagonal_fisher(layer, [(torch.ones(4, 2), None)], "gaussian", observers=[Seen(collector)])
    collector.finish(4)
    factors = collector.information({"weight": torch.full((1, 2), 3.0)}).factors
    torch.testing.assert_close(float(factors.A.trace() * factors.G.trace()), 6.0)


class Seen:
    """Hands gradients to one collector."""

    def __init__(self, collector):
        self.see = collector.see

    def end_batch(self, size):
        pass


def test_gradients_that_are_no_products_add_nothing_to_the_factors():
    collector = layer_state()[1].observe(["weight"], True)
    collector.see("weight", object())
    assert all(not factor.any() for factor in collector.finish(4))


def test_a_second_task_without_information_halves_the_mean_and_moves_the_anchor():
    theta, state = layer_state(alpha=(15.0, 0.0))
    assert state.strain([theta + 0.1]).forgetting == pytest.approx(0.5 * 15.0 * 0.01)
    moved = theta + 0.125
    gain = state.consolidate([moved], KroneckerInformation(Factors(torch.zeros(2, 2), torch.zeros(1, 1))))
    torch.testing.assert_close(gain, 0.5 * torch.log2(torch.tensor([[8.5 / 16, 1.0]])))
    assert torch.equal(state.anchor, moved)


def test_between_two_pulls_a_layer_is_not_put_into_its_cells():
    theta, state = layer_state()
    moved = theta + 0.75
    state.hold_back(Step([moved], state, pull=3.0, rate=0.0))
    assert torch.equal(moved, theta + 0.75)
