"""The Fisher information of many networks equals that of one backward pass per sample."""

from __future__ import annotations

import pytest
import torch
from torch import distributions as D
from torch import nn

from lightning_blip.fisher import diagonal_fisher
from lightning_blip.fisher.fallback import Fallback
from tests.fisher.architectures import ARCHITECTURES
from tests.fisher.layers import LAYERS, UNRULED
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


@pytest.fixture
def fallen_back(monkeypatch):
    """The names of the parameters that the fallback estimated."""
    names = set()
    choose = Fallback.choose

    def remember(self, sample):
        names.update(self.parameters)
        choose(self, sample)

    monkeypatch.setattr(Fallback, "choose", remember)
    return names


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_exact_by_rules(name, fallen_back):
    network, inputs, targets = make(name)
    expected = slow_fisher(network, inputs, targets)
    found = diagonal_fisher(network, in_batches(inputs, targets, 4), labels="empirical")
    assert_same(found, expected)
    assert fallen_back == ({"scale"} if name == "data dependent" else set())


@pytest.mark.parametrize("name", [*LAYERS, *UNRULED])
def test_every_layer_is_exact_and_only_layers_without_rule_fall_back(name, fallen_back):
    network, inputs = {**LAYERS, **UNRULED}[name]
    network, inputs, targets = network().double(), inputs(), torch.randint(3, (7,))
    expected = slow_fisher(network, inputs, targets)
    found = diagonal_fisher(network, in_batches(inputs, targets, 3), labels="empirical")
    assert_same(found, expected)
    assert bool(fallen_back) is (name in UNRULED)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_exact_by_rules(name, fallen_back):
    network, inputs, targets = ARCHITECTURES[name]()
    expected = slow_fisher(network, inputs, targets)
    found = diagonal_fisher(network, in_batches(inputs, targets, 3), labels="empirical")
    assert_same(found, expected)
    assert not fallen_back


def test_the_fallback_gets_only_parameters_without_rule(fallen_back):
    network, inputs = UNRULED["packed"]
    network, inputs, targets = network().double(), inputs(), torch.randint(3, (7,))
    diagonal_fisher(network, in_batches(inputs, targets, 3))
    assert fallen_back == {f"rnn.{kind}_{part}_l0" for kind in ("weight", "bias") for part in ("ih", "hh")}


def test_each_batch_has_one_forward_pass():
    network, inputs, targets = make("batch norm")
    sizes = []
    network.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    diagonal_fisher(network, in_batches(inputs, targets, 4))
    assert sizes == [2, 1, 4, 4, 1]  # the probe on two samples and on one of them, then the batches


def test_a_transformer_is_exact():
    network, tokens, targets = (
        Tokens().double(),
        torch.randint(11, (SAMPLES, 5)),
        torch.randint(3, (SAMPLES,)),
    )
    expected = slow_fisher(network, tokens, targets)
    found = diagonal_fisher(network, in_batches(tokens, targets, 4), labels="empirical")
    assert_same(found, expected)


def test_single_precision_agrees_with_double():
    network = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 3))
    inputs, targets = torch.randn(SAMPLES, 20), torch.randint(3, (SAMPLES,))
    found = diagonal_fisher(network, in_batches(inputs, targets, 4), labels="empirical")
    expected = slow_fisher(network.double(), (inputs.double(),), targets)
    assert all(value.dtype == torch.float32 for value in found.values())
    assert_same({name: value.double() for name, value in found.items()}, expected, rtol=1e-4)


def test_half_precision_is_summed_in_single_precision():
    network = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 3)).bfloat16()
    inputs, targets = torch.randn(SAMPLES, 20).bfloat16(), torch.randint(3, (SAMPLES,))
    found = diagonal_fisher(network, in_batches(inputs, targets, 4), labels="empirical")
    expected = slow_fisher(network.double(), (inputs.double(),), targets)
    for name, value in found.items():
        assert value.dtype == torch.float32
        assert (value - expected[name]).norm() < 0.1 * expected[name].norm()


@pytest.mark.parametrize(("likelihood", "log_prob"), [("gaussian", gaussian), ("bernoulli", bernoulli)])
def test_every_likelihood_of_numbers_is_exact(likelihood, log_prob):
    network, inputs, _ = make("mlp")
    targets = torch.rand(SAMPLES, 3, dtype=torch.float64).round()
    expected = slow_fisher(network, inputs, targets, log_prob)
    found = diagonal_fisher(network, in_batches(inputs, targets, 4), likelihood, "empirical")
    assert_same(found, expected)


def test_a_small_memory_budget_changes_no_value(monkeypatch):
    monkeypatch.setattr("lightning_blip.fisher.gradients.CPU_CHUNK_BYTES", 10_000)
    monkeypatch.setattr("lightning_blip.fisher.fallback.BUDGET_BYTES", 1_000)
    monkeypatch.setattr("lightning_blip.fisher.probe.BUDGET_BYTES", 1_000)
    for name in ("conv2d", "sequence", "tied", "weight norm", "data dependent"):
        network, inputs, targets = make(name)
        expected = slow_fisher(network, inputs, targets)
        assert_same(diagonal_fisher(network, [(inputs, targets)], labels="empirical"), expected)


@pytest.mark.parametrize("multiply_adds", [0, 10**6])
def test_both_forms_of_products_are_exact(monkeypatch, multiply_adds):
    monkeypatch.setattr("lightning_blip.fisher.gradients.MULTIPLY_ADDS_PER_SQUARE", multiply_adds)
    for name in ("conv2d", "conv1d", "sequence", "used twice"):
        network, inputs, targets = make(name)
        expected = slow_fisher(network, inputs, targets)
        assert_same(diagonal_fisher(network, [(inputs, targets)], labels="empirical"), expected)


def test_sparse_and_dense_embeddings_have_the_same_information():
    torch.manual_seed(0)
    x = torch.randint(7, (8, 3))
    found = []
    for sparse in (False, True):
        torch.manual_seed(1)
        rows = nn.Embedding(7, 4, sparse=sparse)
        network = nn.Sequential(rows, nn.Flatten(), nn.Linear(12, 12), nn.PReLU(), nn.Linear(12, 3))
        found.append(diagonal_fisher(network, [(x, None)], generator=torch.Generator().manual_seed(2)))
    dense, sparse = found
    assert all(torch.equal(dense[name], sparse[name]) for name in dense)
    assert dense["0.weight"].any()


def test_only_the_named_parameters_are_estimated():
    network, inputs, targets = make("batch norm")
    expected = slow_fisher(network, inputs, targets)
    names = ["4.bias", "1.weight", "0.weight"]
    found = diagonal_fisher(network, [(inputs, targets)], labels="empirical", parameters=names)
    assert_same(found, {name: expected[name] for name in names})


def test_parameters_without_gradients_are_left_out():
    network, inputs, targets = make("mlp")
    expected = slow_fisher(network, inputs, targets)
    network[0].requires_grad_(False)
    found = diagonal_fisher(network, [(inputs, targets)], labels="empirical")
    assert_same(found, {name: expected[name] for name in ("2.weight", "2.bias")})


@pytest.fixture
def no_batch_is_looped(monkeypatch):
    """Fails where the fallback takes the samples of a batch one by one."""
    looped = Fallback._looped_squares

    def refuse_batches(self, batch):
        assert batch.size == 1
        return looped(self, batch)

    monkeypatch.setattr(Fallback, "_looped_squares", refuse_batches)


@pytest.mark.parametrize("likelihood", ["categorical", lambda out: D.Categorical(logits=out)])
def test_the_fallback_is_vectorised_where_possible(likelihood, no_batch_is_looped):
    network, inputs = UNRULED["exponent"]
    diagonal_fisher(network().double(), in_batches(inputs(), torch.randint(3, (7,)), 4), likelihood)


def test_the_fallback_takes_samples_one_by_one_where_values_are_read(no_batch_is_looped):
    network, inputs, targets = make("data dependent")
    with pytest.raises(AssertionError):
        diagonal_fisher(network, in_batches(inputs, targets, 4))


def test_a_compiled_module_is_exact():
    network, (inputs,), targets = make("mlp")
    expected = slow_fisher(network, (inputs,), targets)
    found = diagonal_fisher(torch.compile(network), [(inputs, targets)], labels="empirical")
    assert_same({name.removeprefix("_orig_mod."): value for name, value in found.items()}, expected)


def test_channels_last_memory_is_exact():
    network, (inputs,), targets = make("conv2d")
    expected = slow_fisher(network, (inputs,), targets)
    network.to(memory_format=torch.channels_last)
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    assert_same(diagonal_fisher(network, [(inputs, targets)], labels="empirical"), expected)
