"""Prior, pull and damping, chosen from the first task."""

import math

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_blip import BLIP, TaskHeads
from lightning_blip.fisher import diagonal_fisher
from lightning_blip.fisher.overlap import OverlapObserver
from lightning_blip.frozen.gains import exact_bits
from lightning_blip.strengths import Measured, choose_damping, choose_prior, choose_pull
from tests.helpers.networks import QUIET, Net, blobs, pairs


def measured(scale=1.0):
    generator = torch.Generator().manual_seed(0)
    spread = 10.0 ** (6 * torch.rand(2, 2_000, generator=generator) - 6)
    return [Measured(scale * spread[0], 10.0, 0.5), Measured(scale * spread[1], 1.0, 1.0)]


def bits_of(one, prior, tasks):
    S_0 = prior * one.unit
    return exact_bits(S_0 + tasks * one.information, S_0, 20)


def test_by_default_one_bit_in_500_is_frozen_after_the_expected_tasks():
    for tasks in (2, 10, 50):
        prior = choose_prior(measured(), 20, tasks)
        used = torch.cat([bits_of(one, prior, tasks) for one in measured()]).double().mean() / 20
        assert 0.0019 < used <= 0.002


def test_the_prior_goes_with_the_scale_of_the_information_but_not_where_nats_are_given():
    small, large = (choose_prior(measured(scale), 20, 10) for scale in (1.0, 4.0**10))
    assert large / small == pytest.approx(4.0**10, rel=1e-4)
    small, large = (choose_prior(measured(scale), 20, 10, 0.01) for scale in (1.0, 4.0**10))
    assert 0.1 < large / small < 1.1


@pytest.mark.parametrize("budget", [0.01, 1.0])
def test_a_budget_bounds_what_uniform_values_in_their_cells_would_forget(budget):
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


def test_a_smaller_budget_and_more_tasks_freeze_more_or_as_much():
    assert choose_prior(measured(), 20, 10, 0.01) < choose_prior(measured(), 20, 10, 1.0)
    assert choose_prior(measured(), 20, 100) > choose_prior(measured(), 20, 10)


def full_fisher(network, x):
    """The whole matrix, from every class of every sample, by autograd."""
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
def test_overlaps_tell_the_norm_of_the_whole_matrix(batch):
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


def test_without_two_samples_in_a_batch_nothing_is_known():
    observer = OverlapObserver(largest=8)
    diagonal_fisher(nn.Linear(2, 2), [(torch.ones(1, 2), None)] * 3, observers=[observer])
    assert observer.squared_norm() is None
    blip = BLIP()
    blip.consolidate(nn.Linear(2, 2), [(torch.ones(1, 2), None)] * 3)
    assert blip.chosen["pull"] == 3.0


def test_what_is_chosen_follows_the_formulas_and_stays():
    network, blip = nn.Linear(8, 6), BLIP(samples=3_000, smoothing=0.0)
    loader = DataLoader(TensorDataset(*blobs(3_000).tensors), batch_size=100)
    observer = OverlapObserver(largest=48)
    fisher = diagonal_fisher(
        network, loader, generator=torch.Generator().manual_seed(0), observers=[observer]
    )
    report = blip.consolidate(network, loader)
    diagonal = float(sum(part.square().sum() for part in fisher.values()))
    trace = float(sum(part.sum() for part in fisher.values()))
    assert blip.chosen["pull"] == pytest.approx(choose_pull(observer.squared_norm(), diagonal))
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
def test_a_task_that_told_nothing_leaves_the_choice_to_the_next(basis):
    """A first task of one class has no information."""
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
    assert blip.chosen == pytest.approx(plain.chosen, rel=0.2)  # other labels were drawn
    assert 0 < blip.used_capacity < 0.01


def test_information_too_small_to_square_in_single_precision():
    network = nn.Linear(4, 3)
    with torch.no_grad():
        network.weight.mul_(0.01)
        network.bias.copy_(torch.tensor([30.0, 0.0, 0.0]))
    blip = BLIP(smoothing=0.0)
    blip.consolidate(network, [(torch.randn(64, 4), None)])
    assert all(math.isfinite(value) and value > 0 for value in blip.chosen.values())


def test_what_is_given_is_not_chosen():
    blip = BLIP(prior=0.5, pull=7.0, damping=0.25)
    blip.consolidate(nn.Linear(8, 6), DataLoader(blobs(), batch_size=30))
    assert blip.chosen == {"prior": 0.5, "pull": 7.0, "damping": 0.25}
    partly = BLIP(pull=7.0)
    partly.consolidate(nn.Linear(8, 6), DataLoader(blobs(), batch_size=30))
    assert partly.chosen["pull"] == 7.0
    assert partly.chosen.keys() == {"prior", "pull", "damping"}


def test_damping_spreads_a_layers_information_over_its_outputs():
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


def test_a_network_that_is_sure_has_information_only_with_smoothing():
    network = nn.Linear(4, 2)
    network.weight.data = torch.tensor([[99.0] * 4, [-99.0] * 4])
    x = torch.ones(500, 4)
    for smoothing, fewest in ((0.0, 0.0), (0.1, 0.02)):
        fisher = diagonal_fisher(network, [(x, None)], smoothing=smoothing)["weight"]
        assert (fisher >= fewest).all()
        assert (fisher == 0).all() == (smoothing == 0)


@pytest.mark.parametrize("likelihood", ["bernoulli", torch.distributions.Bernoulli])
def test_smoothing_mixes_in_the_even_odds(likelihood):
    class Sure(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.tensor([20.0]))

        def forward(self, x):
            logits = self.bias + 0 * x
            return logits if likelihood == "bernoulli" else logits.sigmoid().clamp(max=1 - 1e-6)

    fisher = diagonal_fisher(
        Sure(), [(torch.zeros(4_000, 1), None)], likelihood, smoothing=0.2,
    )["bias"]  # fmt: skip
    if likelihood == "bernoulli":
        assert fisher.item() == pytest.approx(0.1, rel=0.2)  # a tenth of the labels is wrong, with gradient 1
    with pytest.raises(ValueError, match=r"smoothing=1\.5 must be 0"):
        diagonal_fisher(Sure(), [(torch.zeros(4, 1), None)], smoothing=1.5)


def test_few_samples_have_their_labels_drawn_again_and_again():
    network, report = nn.Linear(8, 6), {}
    few, many = blobs(60), blobs(60).tensors
    for name, data, samples in (
        ("few", few, 8_000),
        ("repeated", TensorDataset(*(part.repeat(17, *[1] * (part.ndim - 1)) for part in many)), 8_000),
    ):
        blip = BLIP(prior=1e-3, damping=0.0, samples=samples)
        blip.consolidate(network, DataLoader(data, batch_size=60))
        report[name] = blip.precision()["weight"]
    torch.testing.assert_close(report["few"], report["repeated"], rtol=2e-3, atol=1e-6)


def test_forgetting_is_predicted_while_a_task_trains(tmp_path):
    class Look(pl.Callback):
        rows = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            blip = trainer.callbacks[0] if isinstance(trainer.callbacks[0], BLIP) else trainer.callbacks[1]
            if not blip.tasks_learned:
                return
            total = 0.0
            for name, theta in pl_module.named_parameters():
                state = blip.state(name)
                F = state.prior * state.information
                total += float((0.5 * F * (theta - state.anchor(theta.dtype)).square()).sum())
            self.rows.append(total / blip.tasks_learned)

    blip = BLIP()
    pl.Trainer(**{**QUIET, "logger": CSVLogger(tmp_path)}, callbacks=[blip, Look()], log_every_n_steps=1).fit(
        Net(), datamodule=pairs()
    )
    (path,) = tmp_path.rglob("metrics.csv")
    lines = path.read_text().splitlines()
    columns = lines[0].split(",")
    at = {
        name: columns.index(f"blip/{name}") for name in ("predicted_forgetting", "seconds", "at_wall_share")
    }
    logged = [line.split(",") for line in lines[1:]]
    live = [
        float(row[at["predicted_forgetting"]])
        for row in logged
        if row[at["predicted_forgetting"]] and not row[at["seconds"]]
    ]
    assert len(Look.rows) == 2 * 2 * 3
    assert live == pytest.approx(Look.rows, rel=1e-4)
    assert max(live) > 0
    assert all(0 <= float(row[at["at_wall_share"]]) <= 1 for row in logged if row[at["at_wall_share"]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prior": "mine"}, "prior='mine' must be a number"),
        ({"damping": -1.0}, "damping=-1.0 must not be negative"),
        ({"every": 0}, "every=0 must be a number of steps"),
        ({"expected_tasks": 0}, "expected_tasks=0 must be at least 1"),
        ({"forgetting_budget": 0.0}, "forgetting_budget=0.0 must be positive"),
        ({"smoothing": -0.1}, "smoothing=-0.1 must be 0"),
        ({"pull": "strong"}, "pull='strong' must be a number"),
        ({"likelihood": "categoricl"}, "likelihood='categoricl' is not known: give one of 'categorical'"),
        ({"rank": 3}, "rank=3 has no effect in basis='diagonal'"),
        ({"prior": 1e-5, "forgetting_budget": 0.1}, "forgetting_budget=0.1 chooses the prior"),
    ],
)
def test_arguments_that_are_off(arguments, message):
    with pytest.raises(ValueError, match=message):
        BLIP(**arguments)
