"""The Fisher of many networks against one backward pass per sample."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_blip.fisher import diagonal_fisher
from lightning_blip.fisher.fallback import PerSample
from tests.fisher.networks import NETWORKS, Tokens
from tests.fisher.reference import assert_same, bernoulli, gaussian, in_batches, slow_fisher

SAMPLES = 9


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(name):
    network, shapes = NETWORKS[name]
    network = network().double()
    inputs = tuple(torch.randn(SAMPLES, *shape, dtype=torch.float64) for shape in shapes)
    return network, inputs, torch.randint(3, (SAMPLES,))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network(name):
    network, inputs, targets = make(name)
    expected = slow_fisher(network, inputs, targets)
    found = diagonal_fisher(network, in_batches(inputs, targets, 4), labels="empirical")
    assert_same(found, expected)


def test_transformer():
    network, tokens, targets = (
        Tokens().double(),
        torch.randint(11, (SAMPLES, 5)),
        torch.randint(3, (SAMPLES,)),
    )
    expected = slow_fisher(network, (tokens,), targets)
    found = diagonal_fisher(network, in_batches(tokens, targets, 4), labels="empirical")
    assert_same(found, expected)


def test_single_precision():
    network = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 3))
    inputs, targets = torch.randn(SAMPLES, 20), torch.randint(3, (SAMPLES,))
    found = diagonal_fisher(network, in_batches(inputs, targets, 4), labels="empirical")
    expected = slow_fisher(network.double(), (inputs.double(),), targets)
    assert all(value.dtype == torch.float32 for value in found.values())
    assert_same({name: value.double() for name, value in found.items()}, expected, rtol=1e-4)


def test_half_precision_is_summed_in_single():
    network = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 3)).bfloat16()
    inputs, targets = torch.randn(SAMPLES, 20).bfloat16(), torch.randint(3, (SAMPLES,))
    found = diagonal_fisher(network, in_batches(inputs, targets, 4), labels="empirical")
    expected = slow_fisher(network.double(), (inputs.double(),), targets)
    for name, value in found.items():
        assert value.dtype == torch.float32
        assert (value - expected[name]).norm() < 0.1 * expected[name].norm()


@pytest.mark.parametrize(("likelihood", "log_prob"), [("gaussian", gaussian), ("bernoulli", bernoulli)])
def test_likelihoods(likelihood, log_prob):
    network, inputs, _ = make("mlp")
    targets = torch.rand(SAMPLES, 3, dtype=torch.float64).round()
    expected = slow_fisher(network, inputs, targets, log_prob)
    found = diagonal_fisher(network, in_batches(inputs, targets, 4), likelihood, "empirical")
    assert_same(found, expected)


def test_a_chunk_may_hold_few_samples(monkeypatch):
    monkeypatch.setattr("lightning_blip.fisher.products.CPU_CHUNK_BYTES", 10_000)
    monkeypatch.setattr("lightning_blip.fisher.fallback.CHUNK_BYTES", 100)
    for name in ("conv2d", "sequence", "bare"):
        network, inputs, targets = make(name)
        expected = slow_fisher(network, inputs, targets)
        assert_same(diagonal_fisher(network, [(inputs, targets)], labels="empirical"), expected)


def test_only_the_named_parameters():
    network, inputs, targets = make("batch norm")
    expected = slow_fisher(network, inputs, targets)
    names = ["4.bias", "1.weight", "0.weight"]
    found = diagonal_fisher(network, [(inputs, targets)], labels="empirical", parameters=names)
    assert_same(found, {name: expected[name] for name in names})


def test_frozen_parameters_are_left_out():
    network, inputs, targets = make("mlp")
    expected = slow_fisher(network, inputs, targets)
    network[0].requires_grad_(False)
    found = diagonal_fisher(network, [(inputs, targets)], labels="empirical")
    assert_same(found, {name: expected[name] for name in ("2.weight", "2.bias")})


def test_rules_carry_the_layers_that_they_fit(monkeypatch):
    def refuse(*_):
        raise AssertionError("went to the fallback")

    monkeypatch.setattr(PerSample, "squares", refuse)
    ruled = ["mlp", "conv2d", "same, reflect", "conv3d", "sequence", "used twice", "conv used twice"]
    for name in [*ruled, "in-place relu on a sequence"]:
        network, inputs, targets = make(name)
        diagonal_fisher(network, in_batches(inputs, targets, 4))
    network, inputs, targets = make("tied")
    with pytest.raises(AssertionError, match="fallback"):
        diagonal_fisher(network, in_batches(inputs, targets, 4))


def test_vectorised_where_it_can_be(monkeypatch):
    looped = PerSample._looped_squares

    def one_at_most(self, batch):
        assert batch.size == 1
        return looped(self, batch)

    monkeypatch.setattr(PerSample, "_looped_squares", one_at_most)
    for name in ("bare", "batch norm", "tied", "sequence first", "weight norm"):
        network, inputs, targets = make(name)
        diagonal_fisher(network, in_batches(inputs, targets, 4))
    network, inputs, targets = make("data dependent")
    with pytest.raises(AssertionError):
        diagonal_fisher(network, in_batches(inputs, targets, 4))


def test_channels_last():
    network, (inputs,), targets = make("conv2d")
    expected = slow_fisher(network, (inputs,), targets)
    network.to(memory_format=torch.channels_last)
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    assert_same(diagonal_fisher(network, [(inputs, targets)], labels="empirical"), expected)
