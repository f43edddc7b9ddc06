"""Kronecker factors of the Fisher information of layers, from the same pass as its diagonal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import Tensor, nn

#: Layers whose weight is a matrix: one row per output, one column per input or per value of a patch.
MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def matrix_layers(module: nn.Module, names: Container[str]) -> dict[str, str | None]:
    """Return the linear maps and convolutions of a module, each as the names of its weight and bias.

    The weight and bias of a layer make one matrix: the bias is the weight of an input that is always 1.

    Args:
        module: Any module.
        names: The names of the parameters to use.

    Returns:
        The name of each weight that only one module uses, with the name of its bias; None where there is no
        bias or it is not in ``names``.

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
        A: The mean over samples of a·aᵀ, where a is the input: (in, in), or (in + 1, in + 1) with a bias.
            In a convolution, a is a patch, and a·aᵀ is summed over patches.
        G: The mean over samples of g·gᵀ, where g is the gradient of log p(y|x) with respect to the output:
            (out, out).
    """

    A: Tensor
    G: Tensor

    def calibrated(self, trace: Tensor) -> Factors:
        """Return the factors scaled to equal traces, so that G ⊗ A has the trace of the Fisher information.

        The product of the factors assumes that inputs and gradients, and the positions of a convolution, are
        independent. Scaling corrects the error of this assumption on average.

        Args:
            trace: The trace of the layer's Fisher information.
        """
        A, G = self.A.double(), self.G.double()
        tiny = torch.finfo(torch.float64).tiny
        root = trace.double().sqrt()
        return Factors(A * (root / A.trace().clamp(min=tiny)), G * (root / G.trace().clamp(min=tiny)))
