"""What observers compute from the per-sample gradients, against the gradients of single samples."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_blip.fisher import diagonal_fisher
from lightning_blip.fisher.factors import Factors, matrix_layers
from lightning_blip.fisher.gradients import BUDGET_BYTES, Products
from lightning_blip.fisher.overlap import OverlapObserver
from tests.fisher.layers import LAYERS
from tests.fisher.networks import NETWORKS, Apply
from tests.fisher.reference import in_batches

SAMPLES = 9


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(name):
    network, shapes = NETWORKS[name]
    inputs = tuple(torch.randn(SAMPLES, *shape, dtype=torch.float64) for shape in shapes)
    return network().double(), inputs, torch.randint(3, (SAMPLES,))


def log_prob(network, inputs, targets):
    return -F.cross_entropy(network(*inputs), targets, reduction="sum")


def gradient_rows(network, inputs, targets, names):
    """One row per sample: the gradients of the named parameters."""
    parameters = [network.get_parameter(name) for name in names]
    rows = []
    for i in range(len(targets)):
        total = log_prob(network, [x[i : i + 1] for x in inputs], targets[i : i + 1])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(total, parameters)]))
    return torch.stack(rows)


def squared_products(rows):
    """The squared inner products of all pairs of different samples."""
    products = (rows @ rows.T).square()
    return products[~torch.eye(len(rows), dtype=torch.bool)]


def observe_overlap(network, batches, largest=1):
    observer = OverlapObserver(largest)
    diagonal_fisher(network, batches, labels="empirical", observers=[observer])
    return observer


NAMES = ["mlp", "conv2d", "conv2d to one position", "sequence", "used twice", "tied", "weight norm"]


@pytest.mark.parametrize("name", [*NAMES, "group and layer norm"])
def test_the_squared_norm_is_the_mean_over_pairs_of_samples(name):
    network, inputs, targets = make(name)
    observer = observe_overlap(network, [(inputs, targets)])
    assert observer.names == {name for name, _ in network.named_parameters()}
    expected = squared_products(gradient_rows(network, inputs, targets, observer.names)).mean()
    assert observer.squared_norm() == pytest.approx(expected.item())


def test_the_squared_norm_of_look_ups_is_the_mean_over_pairs_of_samples():
    network, inputs = LAYERS["embedding"]
    network, tokens, targets = network().double(), inputs(), torch.randint(3, (7,))
    observer = observe_overlap(network, [(tokens, targets)])
    expected = squared_products(gradient_rows(network, [tokens], targets, observer.names)).mean()
    assert observer.squared_norm() == pytest.approx(expected.item())


def test_pairs_are_those_of_one_batch_and_one_block():
    network, inputs, targets = make("mlp")
    observer = observe_overlap(network, in_batches(inputs, targets, 5), largest=BUDGET_BYTES // 8 // 2)
    rows = gradient_rows(network, inputs, targets, observer.names)
    blocks = [rows[i : i + 2] for i in (0, 2, 5, 7)]  # of two samples; the fifth of a batch is left out
    expected = torch.cat([squared_products(block) for block in blocks]).mean()
    assert observer.squared_norm() == pytest.approx(expected.item())


def test_batches_of_one_sample_give_no_squared_norm():
    network, inputs, targets = make("mlp")
    assert observe_overlap(network, in_batches(inputs, targets, 1)).squared_norm() is None


def test_no_further_pairs_are_measured_once_there_are_enough(monkeypatch):
    monkeypatch.setattr("lightning_blip.fisher.overlap._PAIRS", 12)
    network, inputs, targets = make("mlp")
    observer = observe_overlap(network, in_batches(inputs, targets, 4))
    rows = gradient_rows(network, inputs, targets, observer.names)
    expected = squared_products(rows[:4]).mean()  # the first batch has the 12 pairs
    assert observer.squared_norm() == pytest.approx(expected.item())


class FactorSums:
    """Adds up the Kronecker factors of all weights that are used in linear maps, with or without a bias."""

    def __init__(self, bias):
        self.bias, self.sums = bias, {}

    def see(self, name, gradients):
        if isinstance(gradients, Products):
            inputs, outputs = gradients.n + self.bias, gradients.m
            zeros = gradients.left.new_zeros
            factors = self.sums.setdefault(name, (zeros(inputs, inputs), zeros(outputs, outputs)))
            gradients.add_factors(*factors)

    def end_batch(self, size):
        pass


def sums_of_factors(network, batches, bias):
    observer = FactorSums(bias)
    diagonal_fisher(network, batches, labels="empirical", observers=[observer])
    return observer.sums


def test_factors_of_a_linear_map_are_sums_over_its_inputs_and_output_gradients():
    network, inputs, targets = make("mlp")
    found = sums_of_factors(network, in_batches(inputs, targets, 4), bias=True)
    hidden = network[:2](*inputs)
    for weight, x, later in (("0.weight", inputs[0], network[1:]), ("2.weight", hidden, network[3:])):
        x = x.detach()
        output = network[int(weight[0])](x).detach().requires_grad_()
        (g,) = torch.autograd.grad(log_prob(later, [output], targets), output)
        a = torch.cat([x, torch.ones(SAMPLES, 1)], 1)
        A, G = found[weight]
        torch.testing.assert_close(A, a.T @ a)
        torch.testing.assert_close(G, g.T @ g)


@pytest.mark.parametrize("chunk", [1, 10**9])
def test_factors_of_a_convolution_are_sums_over_patches(monkeypatch, chunk):
    monkeypatch.setattr("lightning_blip.fisher.gradients.CPU_CHUNK_BYTES", chunk)
    conv = nn.Conv2d(2, 3, (3, 2), bias=False).double()
    later = nn.Sequential(nn.Tanh(), Apply(lambda x: x.flatten(2).mean(2)))
    images, targets = torch.randn(SAMPLES, 2, 6, 5).double(), torch.randint(3, (SAMPLES,))
    network = nn.Sequential(conv, later)
    A, G = sums_of_factors(network, in_batches(images, targets, 4), bias=False)["0.weight"]
    a = F.unfold(images, (3, 2)).transpose(1, 2).flatten(0, 1)
    output = conv(images).detach().requires_grad_()
    (g,) = torch.autograd.grad(log_prob(later, [output], targets), output)
    g = g.flatten(2).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(A, a.T @ a)
    torch.testing.assert_close(G, g.T @ g)


class WithoutRule(nn.Module):
    """Uses the weight of one layer in an ``einsum`` too, which has no rule."""

    def __init__(self):
        super().__init__()
        self.with_rule, self.without = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = self.with_rule(x).tanh()
        return self.without(x) + torch.einsum("bi,oi->bo", x, self.without.weight)


class Names:
    """Keeps the names and the sizes that an observer receives, in their order."""

    def __init__(self):
        self.names, self.sizes = [], []

    def see(self, name, gradients):
        self.names.append(name)

    def end_batch(self, size):
        self.sizes.append(size)


def test_observers_receive_each_parameter_with_a_rule_once_per_batch():
    network, observer = WithoutRule().double(), Names()
    batches = in_batches(torch.randn(6, 5).double(), torch.randint(3, (6,)), 4)
    diagonal_fisher(network, batches, labels="empirical", observers=[observer])
    assert sorted(observer.names) == sorted(["with_rule.weight", "with_rule.bias", "without.bias"] * 2)
    assert observer.sizes == [4, 2]


def test_layers_that_share_a_parameter_or_have_groups_are_no_matrix_layers():
    shared = nn.Linear(4, 4)
    network = nn.Sequential(
        nn.Linear(5, 4), shared, nn.Linear(4, 4), nn.Conv1d(4, 4, 1, groups=2), nn.LayerNorm(4)
    )
    network[2].weight = shared.weight
    names = dict(network.named_parameters())
    assert matrix_layers(network, names) == {"0.weight": "0.bias"}
    assert matrix_layers(network, {"0.weight"}) == {"0.weight": None}
    assert matrix_layers(nn.Linear(2, 2), {"weight", "bias"}) == {"weight": "bias"}


def test_calibrated_factors_have_equal_traces_and_the_trace_of_the_information():
    factors = Factors(torch.rand(3, 3), torch.rand(2, 2)).calibrated(torch.tensor(7.0))
    assert torch.kron(factors.G, factors.A).trace().item() == pytest.approx(7.0)
    assert factors.A.trace().item() == pytest.approx(factors.G.trace().item())
    zero = Factors(torch.zeros(3, 3), torch.zeros(2, 2)).calibrated(torch.tensor(0.0))
    assert not zero.A.any()
    assert not zero.G.any()


def test_products_with_one_position_form_no_gradient_for_inner_products(monkeypatch):
    network, inputs, targets = make("mlp")
    monkeypatch.setattr(Products, "rows", None)
    assert observe_overlap(network, [(inputs, targets)]).squared_norm() > 0
