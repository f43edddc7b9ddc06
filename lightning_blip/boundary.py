"""What one boundary measured and froze, and the names under which its figures are logged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# Figures of the whole network and of each layer, as they are logged: "blip/<figure>" and
# "blip/<figure>/<layer>".
_SHARES = ("at_wall_share", "newly_frozen_share", "drifted_share")
_OF_NETWORK = ("predicted_forgetting", "used_capacity", "information_gain", *_SHARES, "seconds")
_OF_LAYER = ("information_gain", "used_capacity")
_STRENGTHS = ("prior", "pull", "damping")


@dataclass(frozen=True)
class LayerReport:
    """What one boundary froze in one layer.

    Attributes:
        information_gain: The sum over the layer's values, in bits.
        bits: The number of values with 0, 1, …, N frozen bits.
    """

    information_gain: float
    bits: list[int]

    @property
    def values(self) -> int:
        """The number of parameters, or of coordinates in the Kronecker basis."""
        return sum(self.bits)

    @property
    def used_capacity(self) -> float:
        """Σ bits / Σ N, 0 to 1."""
        frozen = sum(bits * count for bits, count in enumerate(self.bits))
        return frozen / ((len(self.bits) - 1) * max(self.values, 1))


@dataclass(frozen=True)
class BoundaryReport:
    """What one boundary measured and froze in a network.

    Attributes:
        predicted_forgetting: See :meth:`lightning_blip.BLIP.predicted_forgetting`, in nats per sample.
        used_capacity: Σ bits / Σ N, 0 to 1.
        at_wall_share: The share of values that lay at the walls of their cells when the task ended.
        newly_frozen_share: The share of values with more frozen bits than before the task.
        drifted_share: The share of values whose frozen bits changed during the task.
        strengths: The prior, pull and damping in use, as far as they are known.
        seconds: The duration of the boundary.
        layers: One report per layer, by the name of its module, in the network's order.

    Example:
        >>> layer = LayerReport(information_gain=4.0, bits=[1, 0, 1])
        >>> report = BoundaryReport(0.0, 0.5, 0.0, 0.5, 0.0, {"pull": 3.0}, 1.5, {"body": layer})
        >>> report.metrics()["blip/used_capacity/body"], report.metrics()["blip/pull"]
        (0.5, 3.0)
    """

    predicted_forgetting: float
    used_capacity: float
    at_wall_share: float
    newly_frozen_share: float
    drifted_share: float
    strengths: Mapping[str, float]
    seconds: float
    layers: Mapping[str, LayerReport]

    @property
    def information_gain(self) -> float:
        """The sum over all layers, in bits."""
        return sum(layer.information_gain for layer in self.layers.values())

    def metrics(self) -> dict[str, float]:
        """Return every figure by the name that it is logged under."""
        of_network = {f"blip/{name}": float(getattr(self, name)) for name in _OF_NETWORK}
        of_layers = {
            f"blip/{name}/{layer}": float(getattr(report, name))
            for name in _OF_LAYER
            for layer, report in self.layers.items()
        }
        return {
            **of_network,
            **of_layers,
            **{f"blip/{name}": value for name, value in self.strengths.items()},
        }


def metric_names(layers: Iterable[str]) -> list[str]:
    """Return the names of all metrics of a boundary, without the leading ``blip/``.

    Args:
        layers: The names of the layers.

    Example:
        >>> metric_names(["body"])[-2:]
        ['information_gain/body', 'used_capacity/body']
    """
    return [*_OF_NETWORK, *_STRENGTHS, *(f"{name}/{layer}" for name in _OF_LAYER for layer in layers)]


def layer_of(parameter: str) -> str:
    """Return the name of the module that a parameter belongs to; its own name if that is the whole network.

    Example:
        >>> layer_of("body.0.weight"), layer_of("scale")
        ('body.0', 'scale')
    """
    return parameter.rpartition(".")[0] or parameter


def counts_by_layer(bits: Mapping[str, Tensor], max_bits: int) -> dict[str, list[int]]:
    """Return the number of values with 0, 1, …, N frozen bits, for each layer.

    Args:
        bits: The frozen bits of each parameter or coordinate, see :meth:`lightning_blip.BLIP.bits`.
        max_bits: N.

    Returns:
        N + 1 counts for each module that has such parameters, by its name.

    Example:
        >>> weight, bias = torch.tensor([[0, 2]]), torch.tensor([0])
        >>> counts_by_layer({"0.weight": weight, "0.bias": bias}, max_bits=2)
        {'0': [2, 0, 1]}
    """
    counts: dict[str, Tensor] = {}
    for name, values in bits.items():
        counted = torch.bincount(values.flatten().cpu(), minlength=max_bits + 1)
        counts[layer_of(name)] = counts.get(layer_of(name), 0) + counted
    return {name: counted.tolist() for name, counted in counts.items()}
