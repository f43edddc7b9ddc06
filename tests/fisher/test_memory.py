"""The memory that an estimate needs beside the activations is small for every network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.memory import peak_bytes
from benchmarks.networks import resnet50
from lightning_blip.fisher import diagonal_fisher
from lightning_blip.fisher.gradients import BUDGET_BYTES

MEBI = 2**20


def test_resnet50_needs_at_most_twice_its_activations_and_the_budget():
    network, x = resnet50().eval(), torch.randn(2, 3, 224, 224)
    output = []
    activations = peak_bytes(lambda: output.append(network(x)))
    output.clear()
    result = sum(p.numel() * p.element_size() for p in network.parameters())
    peak = peak_bytes(lambda: diagonal_fisher(network, [(x, None)]))
    assert activations > 100 * MEBI
    assert peak - result < 2 * activations + BUDGET_BYTES


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(512, 1024), (20, 512)),
        (nn.Linear(512, 1024), (3, 512)),
        (nn.Conv2d(256, 256, 3), (256, 5, 5)),
        (nn.Embedding(50_000, 8), (20,)),
        (nn.LSTM(384, 256, batch_first=True), (7, 384)),
    ],
    ids=["sequence", "short sequence", "convolution", "embedding", "lstm"],
)
def test_the_gradients_of_all_samples_are_never_in_memory_together(layer, shape):
    samples = 300
    x = torch.randint(50_000, (samples, *shape)) if len(shape) == 1 else torch.randn(samples, *shape)
    gradients = samples * sum(p.numel() * p.element_size() for p in layer.parameters())
    network = nn.Sequential(layer, FirstOutput())
    peak = peak_bytes(lambda: diagonal_fisher(network, [(x, None)], likelihood="gaussian"))
    assert gradients > 400 * MEBI
    assert peak < gradients / 2


class FirstOutput(nn.Module):
    """Returns the first of a layer's outputs."""

    def forward(self, output):
        return output[0] if isinstance(output, tuple) else output


class Indexed(nn.Module):
    """A large product by ``einsum``, which has no rule."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(500, 1000))

    def forward(self, x):
        return torch.einsum("bi,io->bo", x, self.weight)


@pytest.mark.parametrize("budget", [8, 1000])
def test_the_fallback_stays_within_the_budget(monkeypatch, budget):
    monkeypatch.setattr("lightning_blip.fisher.fallback.BUDGET_BYTES", budget * MEBI)
    network, x = Indexed(), torch.randn(40, 500)
    peak = peak_bytes(lambda: diagonal_fisher(network, [(x, None)]))
    result = network.weight.numel() * 4
    assert (peak - result < 16 * MEBI) is (budget == 8)


class Powers(nn.Module):
    """A small parameter without a rule, whose forward pass keeps large tensors."""

    def __init__(self):
        super().__init__()
        self.exponent = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return (x.abs() ** self.exponent).mean((1, 2)).unsqueeze(1)


@pytest.mark.parametrize("budget", [8, 1000])
def test_the_fallback_counts_what_a_forward_pass_keeps(monkeypatch, budget):
    monkeypatch.setattr("lightning_blip.fisher.fallback.BUDGET_BYTES", budget * MEBI)
    x = torch.rand(40, 500, 1000)
    network = Powers()
    peak = peak_bytes(lambda: diagonal_fisher(network, [(x, None)], likelihood="gaussian"))
    assert (peak < 4 * x.numel() * x.element_size()) is (budget == 8)
