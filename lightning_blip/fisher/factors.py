"""Kronecker factors of layers' Fisher information, from the same pass as its diagonal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_blip.fisher.gradients import Products, SampleGradients

#: Layers whose weight is a matrix: a row for each output, a column for each input, or each value of a patch.
MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def matrix_layers(module: nn.Module, names: Container[str]) -> dict[str, str | None]:
    """The linear maps and convolutions of a module, whose parameters make one matrix each.

    Args:
        module: Any module.
        names: Of the parameters that count.

    Returns:
        The name of each weight that no other module shares, with that of its bias: the weight of one more
        input that is always 1. None where there is no bias, or it does not count.

    Example:
        >>> matrix_layers(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), {"0.weight", "0.bias"})
        {'0.weight': '0.bias'}
    """
    uses = Counter(id(theta) for _, theta in module.named_parameters(remove_duplicate=False))
    layers: dict[str, str | None] = {}
    for prefix, part in module.named_modules():
        dot = "." if prefix else ""
        weight, bias = f"{prefix}{dot}weight", f"{prefix}{dot}bias"
        if isinstance(part, MATRICES) and getattr(part, "groups", 1) == 1 and weight in names:
            own = [part.weight, part.bias] if bias in names else [part.weight]
            if all(uses[id(theta)] == 1 for theta in own):
                layers[weight] = bias if bias in names else None
    return layers


@dataclass
class Factors:
    """Kronecker factors of the Fisher information of a layer, F ≈ G ⊗ A.

    Attributes:
        A: The mean over samples of a·aᵀ, a the inputs, (in, in), or (in + 1, in + 1) where there is a bias;
            of a convolution, a is a patch, and the mean is of the sum over patches.
        G: The mean over samples of g·gᵀ, g the gradient of log p(y|x) by the outputs, (out, out).
    """

    A: Tensor
    G: Tensor

    def calibrated(self, trace: Tensor) -> Factors:
        """The factors, of equal traces, whose product has the trace of the Fisher information itself.

        What a product takes as independent, inputs and gradients, and the positions of a convolution, is
        not; this corrects for it on average.
        """
        A, G = self.A.double(), self.G.double()
        tiny = torch.finfo(torch.float64).tiny
        root = trace.double().sqrt()
        return Factors(A * (root / A.trace().clamp(min=tiny)), G * (root / G.trace().clamp(min=tiny)))


class FactorObserver:
    """Collects the factors of layers, as one of the ``observers`` of ``diagonal_fisher``.

    Args:
        module: That is estimated.
        layers: Names of a weight and a bias each, as of :func:`matrix_layers`.

    Example:
        >>> from lightning_blip.fisher import diagonal_fisher
        >>> network = nn.Linear(2, 3)
        >>> observer = FactorObserver(network, {"weight": "bias"})
        >>> fisher = diagonal_fisher(network, [(torch.ones(8, 2), None)], observers=[observer])
        >>> observer.factors()["weight"].A
        tensor([[1., 1., 1.],
                [1., 1., 1.],
                [1., 1., 1.]])

    Source:
        Martens and Grosse, Optimizing Neural Networks with Kronecker-factored Approximate Curvature, ICML
        2015; for convolutions Grosse and Martens, A Kronecker-factored approximate Fisher matrix for
        convolution layers, ICML 2016.
    """

    def __init__(self, module: nn.Module, layers: Mapping[str, str | None]) -> None:
        parameters = dict(module.named_parameters())
        self._samples = 0
        self._served: set[str] = set()
        self._sums: dict[str, Factors] = {}
        for weight, bias in layers.items():
            theta = parameters[weight].detach()
            inputs = theta[0].numel() + (bias is not None)
            empty = theta.new_zeros((), dtype=torch.promote_types(theta.dtype, torch.float32))
            self._sums[weight] = Factors(
                empty.new_zeros(inputs, inputs), empty.new_zeros(len(theta), len(theta))
            )

    def see(self, name: str, gradients: SampleGradients) -> None:
        """Takes in a weight's gradients, where they are products."""
        if name in self._sums and isinstance(gradients, Products):
            self._served.add(name)
            gradients.add_factors(self._sums[name].A, self._sums[name].G)

    def end_batch(self, size: int) -> None:
        """Counts the samples."""
        self._samples += size

    def nothing(self, name: str) -> Factors:
        """Factors of a layer that told nothing."""
        return Factors(torch.zeros_like(self._sums[name].A), torch.zeros_like(self._sums[name].G))

    def factors(self) -> dict[str, Factors]:
        """The factors by name of the weight, of those layers that a rule serves."""
        return {
            name: Factors(self._sums[name].A / self._samples, self._sums[name].G / self._samples)
            for name in self._sums
            if name in self._served
        }
