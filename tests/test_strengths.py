"""Prior, pull and damping, as they are chosen at the first boundary."""

import csv
import math

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.distributions import Bernoulli
from torch.utils.data import DataLoader, TensorDataset

from lightning_blip import BLIP, TaskHeads
from lightning_blip.fisher import diagonal_fisher
from lightning_blip.fisher.overlap import OverlapObserver
from lightning_blip.frozen.gains import exact_bits
from lightning_blip.strengths import Measured, choose_damping, choose_prior, choose_pull
from tests.helpers.fitting import fit
from tests.helpers.networks import blobs


def measured(scale=1.0):
    """Return the information of two states, over six powers of ten."""
    generator = torch.Generator().manual_seed(0)
    spread = 10.0 ** (6 * torch.rand(2, 2_000, generator=generator) - 6)
    return [Measured(scale * spread[0], 10.0, 0.5), Measured(scale * spread[1], 1.0, 1.0)]


def bits_of(one, prior, tasks):
    S_0 = prior * one.unit
    return exact_bits(S_0 + tasks * one.information, S_0, 20)


def test_the_prior_freezes_one_bit_in_500_after_the_expected_tasks():
    for tasks in (2, 10, 50):
        prior = choose_prior(measured(), 20, tasks)
        used = torch.cat([bits_of(one, prior, tasks) for one in measured()]).double().mean() / 20
        assert 0.0019 < used <= 0.002


def test_the_prior_follows_the_scale_of_the_information_unless_a_budget_in_nats_is_given():
    small, large = (choose_prior(measured(scale), 20, 10) for scale in (1.0, 4.0**10))
    assert large / small == pytest.approx(4.0**10, rel=1e-4)
    small, large = (choose_prior(measured(scale), 20, 10, 0.01) for scale in (1.0, 4.0**10))
    assert 0.1 < large / small < 1.1


@pytest.mark.parametrize("budget", [0.01, 1.0])
def test_values_drawn_uniformly_from_their_cells_forget_the_budget(budget):
    prior = choose_prior(measured(), 20, 10, forgetting_budget=budget)

    def forgotten(prior):
        generator = torch.Generator().manual_seed(1)
        total = 0.0
        for one in measured():
            width = one.bound * 2.0 ** -bits_of(one, prior, 10).float()
            uniform = 2 * torch.rand(400, len(width), generator=generator) - 1
            total += float((0.5 * one.information * (width * uniform).square()).sum(1).mean())
        return total  # of one task

    assert forgotten(prior) == pytest.approx(budget, rel=0.3)
    assert forgotten(prior / 16) < forgotten(prior)


def test_a_smaller_budget_lowers_the_prior_and_more_expected_tasks_raise_it():
    assert choose_prior(measured(), 20, 10, 0.01) < choose_prior(measured(), 20, 10, 1.0)
    assert choose_prior(measured(), 20, 100) > choose_prior(measured(), 20, 10)


def full_fisher(network, x):
    """Return the whole Fisher matrix, from every class of every sample, by autograd."""
    parameters = list(network.parameters())
    size = sum(theta.numel() for theta in parameters)
    F = torch.zeros(size, size, dtype=torch.float64)
    for sample in x:
        log_p = network(sample[None]).log_softmax(1)[0]
        for c, weight in enumerate(log_p.exp().detach()):
            g = torch.autograd.grad(log_p[c], parameters, retain_graph=True)
            g = torch.cat([part.flatten() for part in g]).double()
            F += weight.double() * torch.outer(g, g)
    return F / len(x)


@pytest.mark.parametrize("batch", [7, 50, 300])
def test_the_overlap_of_samples_estimates_the_norm_of_the_whole_fisher_matrix(batch):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Unflatten(1, (1, 8)),
        nn.Conv1d(1, 2, 3),
        nn.Tanh(),
        nn.Flatten(),
        nn.LayerNorm(12),
        nn.Linear(12, 4),
    )
    x = torch.randn(300, 8)
    F = full_fisher(network, x)
    observer = OverlapObserver(largest=52)
    batches = [(part, None) for part in x.repeat(10, 1).split(batch)]
    fisher = diagonal_fisher(network, batches, observers=[observer])
    assert observer.names == fisher.keys()
    assert observer.squared_norm() == pytest.approx(float(F.square().sum()), rel=0.2)
    trace = float(sum(part.sum() for part in fisher.values()))
    assert trace == pytest.approx(float(F.trace()), rel=0.1)


def test_without_two_samples_in_a_batch_the_constants_of_the_kronecker_basis_are_chosen():
    observer = OverlapObserver(largest=8)
    diagonal_fisher(nn.Linear(2, 2), [(torch.ones(1, 2), None)] * 3, observers=[observer])
    assert observer.squared_norm() is None
    blip = BLIP()
    blip.consolidate(nn.Linear(2, 2), [(torch.ones(1, 2), None)] * 3)
    assert blip.chosen["pull"] == 3.0
    assert blip.chosen["damping"] == 0.2  # the pull alone could be the smallest that is ever chosen


def test_the_chosen_strengths_follow_the_formulas_and_stay_for_all_tasks():
    network, blip = nn.Linear(200, 2), BLIP(samples=3_000, smoothing=0.0)
    # Inputs that are nearly the same: the Fisher matrix is far from diagonal.
    x, y = 1 + 0.1 * torch.randn(3_000, 200), torch.arange(3_000) % 2
    loader = DataLoader(TensorDataset(x, y), batch_size=100)
    observer = OverlapObserver(largest=400)
    fisher = diagonal_fisher(
        network, loader, generator=torch.Generator().manual_seed(0), observers=[observer]
    )
    report = blip.consolidate(network, loader)
    diagonal = float(sum(part.square().sum() for part in fisher.values()))
    trace = float(sum(part.sum() for part in fisher.values()))
    assert blip.chosen["pull"] == pytest.approx(choose_pull(observer.squared_norm(), diagonal))
    assert blip.chosen["pull"] > 3.0  # the smallest that is ever chosen
    assert blip.chosen["damping"] == pytest.approx(choose_damping(observer.squared_norm(), trace))
    assert {name: report[f"blip/{name}"] for name in blip.chosen} == blip.chosen
    chosen = dict(blip.chosen)
    network.weight.data *= 3
    blip.consolidate(network, loader)
    assert blip.chosen == chosen
    restored = BLIP()
    restored.load_state_dict(blip.state_dict())
    assert restored.chosen == chosen


@pytest.mark.parametrize("basis", ["diagonal", "kronecker"])
def test_after_a_first_task_without_information_the_second_task_decides(basis):
    """A task with a single class has no information."""
    torch.manual_seed(0)
    body, heads = nn.Linear(8, 64), TaskHeads(64, classes=[1, 6])
    network, options = nn.Sequential(body, heads), {"basis": basis, "expected_tasks": 1}
    blip, plain = BLIP(**options), BLIP(**options)
    blip.consolidate(network, DataLoader(blobs(), batch_size=30))
    assert blip.chosen == {}
    assert blip.used_capacity == 0
    heads.active = 1
    blip.consolidate(network, DataLoader(blobs(), batch_size=30))
    plain.consolidate(network, DataLoader(blobs(), batch_size=30))
    assert blip.tasks_learned == 2
    assert blip.chosen == pytest.approx(plain.chosen, rel=0.2)  # not the same labels are drawn
    assert 0 < blip.used_capacity < 0.01


def test_strengths_are_finite_where_information_is_too_small_to_square_in_float32():
    network = nn.Linear(4, 3)
    with torch.no_grad():
        network.weight.mul_(0.01)
        network.bias.copy_(torch.tensor([30.0, 0.0, 0.0]))
    blip = BLIP(smoothing=0.0)
    blip.consolidate(network, [(torch.randn(64, 4), None)])
    assert blip.chosen.keys() == {"prior", "pull", "damping"}
    assert all(math.isfinite(value) and value > 0 for value in blip.chosen.values())


def test_a_strength_that_is_given_is_kept():
    blip = BLIP(prior=0.5, pull=7.0, damping=0.25)
    blip.consolidate(nn.Linear(8, 6), DataLoader(blobs(), batch_size=30))
    assert blip.chosen == {"prior": 0.5, "pull": 7.0, "damping": 0.25}
    partly = BLIP(pull=7.0)
    partly.consolidate(nn.Linear(8, 6), DataLoader(blobs(), batch_size=30))
    assert partly.chosen["pull"] == 7.0
    assert partly.chosen.keys() == {"prior", "pull", "damping"}


def test_damping_spreads_the_information_of_a_layer_over_its_outputs():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6))
    loader = DataLoader(blobs(), batch_size=30)
    plain, damped = (BLIP(prior=1e-3, damping=d) for d in (0.0, 2.0))
    for blip in (plain, damped):
        blip.consolidate(network, loader)
    for name, S in damped.precision().items():
        F = plain.precision()[name] - 1e-3 * (8 if name.startswith("0") else 1)
        expected = plain.precision()[name] + (2.0 * F.mean(0) if name.startswith("0") else 0.0)
        torch.testing.assert_close(S, expected, rtol=4e-3, atol=1e-6)


def test_a_network_with_extreme_logits_has_information_only_with_smoothing():
    network = nn.Linear(4, 2)
    network.weight.data = torch.tensor([[99.0] * 4, [-99.0] * 4])
    x = torch.ones(500, 4)
    for smoothing, fewest in ((0.0, 0.0), (0.1, 0.02)):
        fisher = diagonal_fisher(network, [(x, None)], smoothing=smoothing)["weight"]
        assert (fisher >= fewest).all()
        assert (fisher == 0).all() == (smoothing == 0)


class ExtremeLogit(nn.Module):
    """Predicts 1 with a probability next to 1, whatever the input."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.tensor([20.0]))

    def forward(self, x):
        return self.bias + 0 * x


@pytest.mark.parametrize("likelihood", ["bernoulli", lambda logits: Bernoulli(logits=logits)])
def test_smoothing_draws_labels_of_both_classes_with_equal_odds(likelihood):
    for smoothing in (0.0, 0.2):
        fisher = diagonal_fisher(
            ExtremeLogit(), [(torch.zeros(4_000, 1), None)], likelihood, smoothing=smoothing
        )["bias"]
        # Half of the smoothed labels are wrong, with a gradient of 1.
        assert fisher.item() == pytest.approx(smoothing / 2, rel=0.2, abs=1e-6)


def test_a_smoothing_above_1_is_refused_by_the_estimate():
    with pytest.raises(ValueError, match=r"smoothing=1\.5 must be 0"):
        diagonal_fisher(ExtremeLogit(), [(torch.zeros(4, 1), None)], "bernoulli", smoothing=1.5)


def test_a_small_task_gives_the_information_of_the_same_samples_repeated():
    network, precisions = nn.Linear(8, 6), []
    few = blobs(60).tensors
    for tensors in (few, [part.repeat(17, *[1] * (part.ndim - 1)) for part in few]):
        blip = BLIP(prior=1e-3, damping=0.0, samples=8_000)
        blip.consolidate(network, DataLoader(TensorDataset(*tensors), batch_size=60))
        precisions.append(blip.precision()["weight"])
    torch.testing.assert_close(*precisions, rtol=2e-3, atol=1e-6)


def test_the_predicted_forgetting_is_logged_after_every_step(tmp_path):
    class Formula(pl.Callback):
        def __init__(self, blip):
            self.blip = blip
            self.forgetting = []

        @torch.no_grad()
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if not self.blip.tasks_learned:
                return
            total = 0.0
            for name, theta in pl_module.named_parameters():
                state = self.blip.state(name)
                F = state.prior * state.information
                total += float((0.5 * F * (theta - state.anchor(theta.dtype)).square()).sum())
            self.forgetting.append(total / self.blip.tasks_learned)

    blip = BLIP()
    formula = Formula(blip)
    fit([blip, formula], logger=CSVLogger(tmp_path), log_every_n_steps=1)
    (path,) = tmp_path.rglob("metrics.csv")
    with path.open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["blip/predicted_forgetting"]]
    live = [float(row["blip/predicted_forgetting"]) for row in rows if not row["blip/seconds"]]
    assert len(formula.forgetting) == 2 * 2 * 3
    assert live == pytest.approx(formula.forgetting, rel=1e-4)
    assert max(live) > 0
    shares = [float(row["blip/at_wall_share"]) for row in rows]
    assert len(shares) == len(live) + 3
    assert all(0 <= share <= 1 for share in shares)
