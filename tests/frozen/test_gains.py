"""From Fisher information to frozen bits, by the exact rule and by the paper's."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_blip.frozen.diagonal import DiagonalInformation, DiagonalState
from lightning_blip.frozen.gains import average_fisher, exact_bits, information_gain, paper_bits


def consolidate(theta, frozen, fisher):
    return frozen.consolidate([theta], DiagonalInformation(fisher))


FISHERS = st.lists(
    st.lists(st.floats(min_value=0, max_value=1e6, width=32), min_size=4, max_size=4), min_size=1, max_size=6
)
PRIORS = st.sampled_from([1e-11, 1e-6, 1e-3, 1.0])


@given(FISHERS, PRIORS)
def test_the_gains_of_the_exact_rule_add_up_to_one_logarithm(fishers, prior):
    theta = torch.tensor([0.1, -0.2, 0.3, 0.0])
    frozen = DiagonalState.of(theta, 1.0, prior)
    gains = [consolidate(theta, frozen, torch.tensor(fisher)) for fisher in fishers]
    whole = information_gain(frozen.precision, torch.tensor(prior))
    torch.testing.assert_close(torch.stack(gains).sum(0), whole, rtol=1e-5, atol=1e-4)
    assert torch.equal(frozen.bits, (whole + 0.5).floor().clamp(0, 20).to(torch.uint8))


@given(FISHERS, PRIORS, st.sampled_from(["exact", "paper"]), st.sampled_from(["strict", "paper"]))
def test_bits_never_decrease_and_never_exceed_max_bits(fishers, prior, rule, cell):
    theta = torch.tensor([0.1, -0.2, 0.3, 0.0])
    frozen = DiagonalState.of(theta, 1.0, prior, max_bits=12, cell=cell, rule=rule)
    for fisher in fishers:
        before = frozen.bits
        consolidate(theta, frozen, torch.tensor(fisher))
        assert (frozen.bits >= before).all()
        assert (frozen.bits <= 12).all()


@given(FISHERS, PRIORS, st.sampled_from(["exact", "paper"]))
def test_frozen_codes_stay_the_same_at_every_boundary_in_the_strict_cell(fishers, prior, rule):
    theta = torch.tensor([0.1, -0.2, 0.3, -0.999])
    frozen = DiagonalState.of(theta, 1.0, prior, rule=rule)
    for fisher in fishers:
        bits, code = frozen.bits, frozen.code
        consolidate(theta, frozen, torch.tensor(fisher))
        shift, third = 20 - bits.to(torch.int32), 2**20 // 3
        assert torch.equal(((code + third) >> shift)[bits > 0], ((frozen.code + third) >> shift)[bits > 0])


def test_a_task_without_information_freezes_nothing():
    theta = torch.tensor([0.3])
    for rule in ("exact", "paper"):
        frozen = DiagonalState.of(theta, 1.0, 1e-6, rule=rule)
        consolidate(theta.clone(), frozen, torch.zeros(1))
        assert frozen.bits.item() == 0


def test_the_papers_rule_gives_the_figures_computed_by_hand():
    theta = torch.tensor([0.3])
    frozen = DiagonalState.of(theta, 1.0, prior=1.0, cell="paper", rule="paper")
    first = consolidate(theta, frozen, torch.tensor([31.0]))
    assert first.item() == 2.0  # (31 + 1)/2 = 16 times the prior
    assert (frozen.bits.item(), frozen.precision.item(), theta.item()) == (2, 16.0, 0.25)
    second = consolidate(theta, frozen, torch.tensor([40.0]))
    assert frozen.precision.item() == pytest.approx((40 + 2 * 16) / 3)
    assert second.item() == pytest.approx(0.5 * torch.log2(torch.tensor(1.5)).item())
    assert frozen.bits.item() == 3
    third = consolidate(theta, frozen, torch.tensor([0.0]))
    assert third.item() < 0
    assert frozen.bits.item() == 3


def test_the_exact_rule_gives_the_figures_computed_by_hand():
    theta = torch.tensor([0.3])
    frozen = DiagonalState.of(theta, 1.0, prior=1.0)
    consolidate(theta, frozen, torch.tensor([3.0]))
    assert (frozen.bits.item(), frozen.precision.item()) == (1, 4.0)
    consolidate(theta, frozen, torch.tensor([0.1]))
    assert (frozen.bits.item(), frozen.precision.item()) == (1, pytest.approx(4.1, rel=2**-11))
    consolidate(theta, frozen, torch.tensor([4.0]))
    assert frozen.bits.item() == 2  # ½·log2(8.1) is nearer to 2
    assert theta.item() == pytest.approx(0.3, abs=2**-21)


def test_average_gain_and_bits_have_the_values_of_their_formulas():
    assert average_fisher(torch.tensor(2.0), torch.tensor(6.0), task=1).item() == 4.0
    assert information_gain(torch.tensor(8.0), torch.tensor(2.0)).item() == 1.0
    assert exact_bits(torch.tensor([2.0**60]), prior=1.0, max_bits=20).item() == 20
    added = paper_bits(torch.tensor([5], dtype=torch.uint8), torch.tensor([1e9]), max_bits=20)
    assert added.item() == 20


def spread_fishers(tasks, values=20_000):
    """Yield the Fisher information of tasks, over twenty orders of magnitude; a tenth of the values is 0."""
    usual = torch.randn(values) * 6
    for _ in range(tasks):
        fisher = torch.exp(usual + torch.randn(values) * 2) * 1e-5
        yield torch.where(torch.rand(values) < 0.1, 0.0, fisher)


@pytest.mark.parametrize("tasks", [1, 10, 50])
@pytest.mark.parametrize("prior", [1e-11, 1e-6, 784e-6])
def test_information_in_sixteen_bits_freezes_almost_the_same_bits_as_in_float32(tasks, prior):
    theta = torch.rand(20_000) - 0.5
    frozen = DiagonalState.of(theta, 1.0, prior)
    running = torch.full_like(theta, prior)
    for fisher in spread_fishers(tasks):
        consolidate(theta, frozen, fisher)
        running += fisher
    expected = (0.5 * torch.log2(running / prior) + 0.5).floor().clamp(0, 20)
    difference = (frozen.bits - expected).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.01
    assert expected.unique().numel() > 14


@pytest.mark.parametrize("prior", [1e-11, 1e-6, 1.0])
def test_gains_far_below_the_prior_add_up(prior):
    theta = torch.zeros(1)
    frozen = DiagonalState.of(theta, 1.0, prior)
    for _ in range(100):
        consolidate(theta, frozen, torch.tensor([1e-5 * prior]))
    assert frozen.information.item() == pytest.approx(1e-3, rel=2**-8)


def test_bits_change_exactly_at_odd_powers_of_two():
    powers = torch.arange(-8, 60, dtype=torch.float64)
    for nudge, below in ((-(2**-20), 1), (0, 0), (2**-20, 0)):
        precision = (2.0**powers * (1 + nudge)).float()
        expected = ((powers - below + 1) / 2).floor().clamp(0, 20)
        assert torch.equal(exact_bits(precision, prior=1.0, max_bits=20), expected.to(torch.uint8))
    assert exact_bits(torch.tensor([math.inf]), prior=1.0, max_bits=20).item() == 20
