"""The networks on which the costs of BLIP are measured, and the size of each measurement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.networks import alexnet, mlp, resnet18, vit, vit_small

Batches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """A network, and the size of each measurement.

    Attributes:
        name: The name in the tables.
        make: Makes the network.
        shape: The shape of one input.
        samples: The number of samples of an estimate.
        batch_size: The batch size of an estimate.
        step_batch_size: The batch size of training steps.
        steps: The number of steps of a timed fit.
        every: The number of steps from one pull to the next in a timed fit: fewer than in BLIP, so that a
            short fit has pulls. A pull is then weighted by how rare it is in BLIP.
    """

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    samples: int
    batch_size: int
    step_batch_size: int
    steps: int
    every: int

    def batches(self, samples: int, batch_size: int, device: str) -> Batches:
        """Return random inputs and labels of ten classes."""
        x = torch.randn(samples, *self.shape, device=device)
        y = torch.randint(0, 10, (samples,), device=device)
        return list(zip(x.split(batch_size), y.split(batch_size), strict=True))


MLP = Case(
    "MLP 784-1200",
    lambda: nn.Sequential(mlp([784, 1200]), nn.Linear(1200, 10)),
    shape=(784,),
    samples=1000,
    batch_size=100,
    step_batch_size=64,
    steps=200,
    every=20,
)
NARROW = Case(
    "MLP 784-100-100",
    lambda: nn.Sequential(mlp([784, 100, 100]), nn.Linear(100, 10)),
    shape=(784,),
    samples=1000,
    batch_size=100,
    step_batch_size=10,
    steps=800,
    every=100,
)
ALEXNET = Case(
    "AlexNet",
    lambda: nn.Sequential(alexnet(), nn.Linear(2048, 10)),
    shape=(3, 32, 32),
    samples=200,
    batch_size=50,
    step_batch_size=64,
    steps=20,
    every=5,
)
RESNET = Case(
    "ResNet-18",
    resnet18,
    shape=(3, 32, 32),
    samples=64,
    batch_size=32,
    step_batch_size=64,
    steps=6,
    every=2,
)
VIT = Case(
    "ViT",
    vit,
    shape=(3, 32, 32),
    samples=64,
    batch_size=32,
    step_batch_size=64,
    steps=6,
    every=2,
)
# Sizes for a GPU.
LARGE_RESNET = replace(RESNET, samples=1_024, batch_size=128, step_batch_size=128, steps=40, every=10)
LARGE_VIT = replace(LARGE_RESNET, name="ViT-S", make=vit_small)
