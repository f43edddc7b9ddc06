"""How labels are drawn from the model's prediction, and which positions are left out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import distributions as D
from torch import nn

from lightning_blip.fisher import diagonal_fisher
from lightning_blip.fisher.likelihood import Draws, find_likelihood
from tests.fisher.networks import NETWORKS, Apply
from tests.fisher.reference import assert_same, bernoulli, in_batches, slow_fisher

SAMPLES = 130


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


LIKELIHOODS = {
    "categorical": "categorical",
    "gaussian": "gaussian",
    "bernoulli": "bernoulli",
    "normal": lambda out: D.Independent(D.Normal(out, out.exp()), 1),
    "laplace": lambda out: D.Laplace(out, 2.0),
    "classes": lambda out: D.Categorical(logits=out),
    "yes or no": lambda out: D.Independent(D.Bernoulli(logits=out), 1),
}


def targets_for(name):
    if name in ("categorical", "classes"):
        return torch.randint(3, (SAMPLES,))
    return torch.rand(SAMPLES, 3, dtype=torch.float64).round()


@pytest.mark.parametrize("labels", ["sampled", "empirical"])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_division_into_batches_changes_no_value(name, labels):
    network = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    inputs, targets = torch.randn(SAMPLES, 5, dtype=torch.float64), targets_for(name)
    one, seven, many = (
        diagonal_fisher(network, in_batches(inputs, targets, size), LIKELIHOODS[name], labels)
        for size in (1, 7, 64)
    )
    assert_same(one, many)
    assert_same(seven, many)
    assert all(value.abs().max() > 0 for value in many.values())


def test_the_division_into_batches_changes_no_value_of_convolutions():
    network = NETWORKS["conv2d"][0]().double()
    inputs = torch.randn(66, 2, 8, 8, dtype=torch.float64)
    one, seven, many = (
        diagonal_fisher(network, in_batches(inputs, torch.zeros(66), size)) for size in (1, 7, 64)
    )
    assert_same(one, many)
    assert_same(seven, many)


def poisson(output):
    return D.Poisson(output.exp())  # has no quantile function


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian", poisson])
def test_the_generator_determines_the_labels(likelihood):
    network, batch = nn.Linear(5, 3), (torch.randn(SAMPLES, 5), None)

    def estimate(generator=None):
        torch.rand(1)  # moves the global generator, which must not matter
        return diagonal_fisher(network, [batch], likelihood, generator=generator)["weight"]

    first, again = estimate(), estimate()
    seeded = [estimate(torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    assert torch.equal(first, again)
    assert torch.equal(first, seeded[0])
    assert not torch.equal(first, seeded[1])


def test_each_label_takes_one_random_number():
    generator, plain = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    diagonal_fisher(nn.Linear(5, 3), [(torch.randn(10, 5), None)], generator=generator)
    torch.rand(10, dtype=torch.float64, generator=plain)
    assert torch.equal(generator.get_state(), plain.get_state())


def test_sampled_labels_give_the_analytic_fisher():
    layer = nn.Linear(4, 3).double()
    inputs = torch.randn(10, 4, dtype=torch.float64)
    p = layer(inputs).softmax(-1).detach()
    expected = (p * (1 - p)).T @ inputs**2 / len(inputs)
    found = diagonal_fisher(layer, in_batches(inputs.repeat(4_000, 1), torch.zeros(40_000), 5_000))
    torch.testing.assert_close(found["weight"], expected, rtol=0.03, atol=0)
    torch.testing.assert_close(found["bias"], (p * (1 - p)).mean(0), rtol=0.03, atol=0)


@pytest.mark.parametrize(
    ("likelihood", "information"),
    [
        ("gaussian", lambda out: torch.ones_like(out)),
        ("bernoulli", lambda out: out.sigmoid() * (1 - out.sigmoid())),
        (lambda out: D.Normal(out, 2.0), lambda out: torch.full_like(out, 0.25)),
        (lambda out: D.Bernoulli(logits=out), lambda out: out.sigmoid() * (1 - out.sigmoid())),
        (lambda out: D.Exponential(out.exp()), lambda out: torch.ones_like(out)),
        (lambda out: D.Poisson(out.exp()), lambda out: out.exp()),
        (
            lambda out: D.MultivariateNormal(out, 4.0 * torch.eye(2, dtype=out.dtype)),
            lambda out: torch.full_like(out, 0.25),
        ),
    ],
)
def test_every_distribution_gives_its_analytic_fisher(likelihood, information):
    layer = nn.Linear(4, 2).double()
    inputs = torch.randn(10, 4, dtype=torch.float64)
    expected = information(layer(inputs).detach()).T @ inputs**2 / len(inputs)
    found = diagonal_fisher(
        layer, in_batches(inputs.repeat(4_000, 1), torch.zeros(40_000), 5_000), likelihood
    )
    torch.testing.assert_close(found["weight"], expected, rtol=0.06, atol=0)


def test_a_class_without_probability_is_never_drawn():
    masked = nn.Sequential(nn.Linear(4, 3), Apply(lambda x: x + torch.tensor([-torch.inf, 0.0, -torch.inf])))
    found = diagonal_fisher(masked, [(torch.randn(500, 4), None)])
    assert all(value.abs().max() == 0 for value in found.values())


CERTAIN = torch.full((20_000, 4), -1e4).index_fill(1, torch.tensor(2), 1e4)


@pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
@pytest.mark.parametrize(
    ("likelihood", "label", "others"),
    [
        ("categorical", 2, 3 / 4),
        (lambda out: D.Categorical(logits=out), 2, 3 / 4),
        ("bernoulli", CERTAIN > 0, 1 / 2),
        (lambda out: D.Bernoulli(logits=out), CERTAIN > 0, 1 / 2),
        (lambda out: D.Independent(D.Bernoulli(logits=out), 1), CERTAIN > 0, 1 / 2),
    ],
)
def test_smoothing_is_the_share_of_labels_drawn_uniformly(likelihood, label, others, smoothing):
    found = find_likelihood(likelihood, torch.device("cpu"), smoothing)
    drawn = found.draw(CERTAIN, None, Draws(torch.Generator().manual_seed(0)))
    assert (drawn != label).double().mean().item() == pytest.approx(smoothing * others, abs=0.01)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize(
    ("likelihood", "information"),
    [
        ("categorical", [1 / 3, 1 / 3, 2 / 3]),
        (lambda out: D.Categorical(logits=out), [1 / 3, 1 / 3, 2 / 3]),
        ("bernoulli", [1 / 2, 1 / 2, 1 / 2]),
        (lambda out: D.Independent(D.Bernoulli(logits=out), 1), [1 / 2, 1 / 2, 1 / 2]),
    ],
)
def test_the_information_of_a_certain_model_is_the_share_of_smoothed_labels(
    likelihood, information, smoothing
):
    layer = nn.Linear(1, 3)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.tensor([-1e4, -1e4, 1e4]))
    found = diagonal_fisher(layer, [(torch.zeros(20_000, 1), None)], likelihood, smoothing=smoothing)
    # A label that differs from the certain one has the gradient ±1.
    expected = [smoothing * share for share in information]
    assert found["bias"].tolist() == pytest.approx(expected, abs=0.01)


def drawn_by(likelihood, output, draws):
    return find_likelihood(likelihood, torch.device("cpu"), 0.0).draw(output, None, draws)


@pytest.mark.parametrize("batches", [1, 3])
def test_a_distribution_without_quantiles_takes_one_random_number_per_batch(batches):
    generator, plain = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    for _ in range(batches):
        drawn_by(poisson, torch.zeros(10, 4), Draws(generator))
        torch.randint(2**62, (), generator=plain)
    assert torch.equal(generator.get_state(), plain.get_state())


def test_processes_draw_different_labels_from_a_distribution_without_quantiles():
    output = torch.zeros(10, 4)
    first, second = (
        drawn_by(poisson, output, Draws(torch.Generator().manual_seed(3), rank, 2)) for rank in (0, 1)
    )
    assert not torch.equal(first, second)


@pytest.mark.parametrize("extreme", [0.0, 1 - 2.0**-53])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_most_extreme_random_numbers_give_finite_labels_of_the_range(monkeypatch, name, dtype, extreme):
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(size, extreme, dtype=torch.float64))
    output = torch.randn(200, 3, dtype=dtype)
    labels = drawn_by(LIKELIHOODS[name], output, Draws(torch.Generator()))
    assert labels.isfinite().all()
    if name in ("categorical", "classes"):
        assert labels.unique().tolist() == [2 if extreme else 0]
    else:
        assert labels.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_targets_may_have_any_integer_type(dtype):
    layer, inputs, targets = nn.Linear(5, 3).double(), torch.randn(9, 5).double(), torch.randint(3, (9,))
    found = diagonal_fisher(layer, [(inputs, targets.to(dtype))], labels="empirical")
    assert_same(found, slow_fisher(layer, (inputs,), targets))
    yes = torch.randint(2, (9, 3))
    found = diagonal_fisher(layer, [(inputs, yes.to(dtype))], "bernoulli", labels="empirical")
    assert_same(found, slow_fisher(layer, (inputs,), yes.double(), bernoulli))


def pixels():
    return nn.Conv2d(2, 3, 3, padding=1).double(), torch.randn(9, 2, 4, 5, dtype=torch.float64), (4, 5)


def tokens():
    return nn.Linear(4, 3).double(), torch.randn(9, 6, 4, dtype=torch.float64), (6,)


@pytest.mark.parametrize("make", [pixels, tokens])
def test_pixels_and_tokens_are_exact(make):
    network, inputs, shape = make()
    targets = torch.randint(3, (9, *shape))
    targets[targets.new_zeros(targets.shape).bernoulli(0.3).bool()] = -100
    targets[2] = -100

    def log_prob(output, target):
        logits = output if make is pixels else output.transpose(1, 2)
        return -F.cross_entropy(logits, target, ignore_index=-100, reduction="sum")

    found = diagonal_fisher(network, in_batches(inputs, targets, 4), labels="empirical")
    assert_same(found, slow_fisher(network, (inputs,), targets, log_prob))


def test_classes_are_in_dimension_1_where_both_dimensions_fit():
    network, inputs = nn.Linear(4, 3).double(), torch.randn(9, 3, 4, dtype=torch.float64)
    targets = torch.randint(3, (9, 3))
    found = diagonal_fisher(network, [(inputs, targets)], labels="empirical")
    assert_same(found, slow_fisher(network, (inputs,), targets))


def test_sampled_labels_leave_out_ignored_positions():
    network, inputs, shape = tokens()
    targets = torch.zeros(9, *shape, dtype=torch.long)
    targets[:, 3:] = -100
    found = diagonal_fisher(network, [(inputs, targets)])
    inputs[:, 3:] = 1e3  # inputs at ignored positions have no effect
    again = diagonal_fisher(network, [(inputs, targets)])
    assert_same(found, again)
    assert found["weight"].max() < 1e2


def test_each_pixel_has_its_own_label():
    layer = nn.Conv2d(1, 2, 1, bias=False).double()
    inputs = torch.ones(2_000, 1, 3, 3, dtype=torch.float64)
    p = layer(inputs[:1]).softmax(1)[0, 0, 0, 0].item()
    found = diagonal_fisher(layer, in_batches(inputs, torch.zeros(2_000), 500))
    # The variance of a sum of nine independent draws; one draw for all would give 81 instead.
    assert found["weight"].flatten().tolist() == pytest.approx([9 * p * (1 - p)] * 2, rel=0.1)


def test_the_logits_may_be_an_attribute_of_the_output():
    layer, inputs, targets = nn.Linear(5, 3).double(), torch.randn(9, 5).double(), torch.randint(3, (9,))
    wrapped = nn.Sequential(layer, Apply(lambda x: SimpleNamespace(logits=x)))
    found = diagonal_fisher(wrapped, [(inputs, targets)], labels="empirical")
    expected = slow_fisher(layer, (inputs,), targets)
    assert_same(found, {f"0.{name}": value for name, value in expected.items()})
