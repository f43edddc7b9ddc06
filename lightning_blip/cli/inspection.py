"""Reads what is frozen in a checkpoint, counts it by layer, and shows it in the terminal."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.bar import Bar
from rich.console import Console
from rich.table import Table

from lightning_blip.blip import BLIP
from lightning_blip.boundary import counts_by_layer
from lightning_blip.checkpoint import upgraded

# The entries of BLIP's state, by which the state of a subclass is found too.
_ENTRIES = {"version", "tasks_learned", "settings", "chosen", "frozen"}
_BAR_WIDTH = 40


@dataclass(frozen=True)
class LayerSummary:
    """What is frozen in one layer, or in several.

    Attributes:
        name: The name of the module.
        counts: The number of its values with 0, 1, …, N frozen bits. A value is a parameter, or a coordinate
            in the Kronecker basis.

    Example:
        >>> layer = LayerSummary("body", [6, 0, 2])
        >>> layer.values, layer.mean_bits, layer.used_capacity, layer.frozen_share
        (8, 0.5, 0.25, 0.25)
    """

    name: str
    counts: list[int]

    @property
    def values(self) -> int:
        """The number of values."""
        return sum(self.counts)

    @property
    def mean_bits(self) -> float:
        """The mean number of frozen bits per value."""
        return sum(bits * count for bits, count in enumerate(self.counts)) / max(self.values, 1)

    @property
    def used_capacity(self) -> float:
        """Σ bits / Σ N, 0 to 1."""
        return self.mean_bits / (len(self.counts) - 1)

    @property
    def frozen_share(self) -> float:
        """The share of values with at least one frozen bit, 0 to 1."""
        return 1.0 - self.counts[0] / max(self.values, 1)


def frozen_layers(blip: BLIP) -> list[LayerSummary]:
    """Return what is frozen in each layer.

    Args:
        blip: A trained BLIP, or one that :func:`read_blip` returned.

    Returns:
        One entry per module with parameters that BLIP tracks.

    Example:
        >>> blip = BLIP()
        >>> report = blip.consolidate(torch.nn.Linear(4, 2), [(torch.randn(8, 4), torch.zeros(8))])
        >>> [(layer.name, layer.values) for layer in frozen_layers(blip)]
        [('weight', 8), ('bias', 2)]
    """
    return [LayerSummary(*one) for one in counts_by_layer(blip.bits(), blip.max_bits).items()]


def whole_network(layers: Sequence[LayerSummary]) -> LayerSummary:
    """Return the sum of all layers' counts, as one layer with the name ``all``.

    Args:
        layers: At least one layer.

    Example:
        >>> whole_network([LayerSummary("0", [2, 1]), LayerSummary("1", [0, 3])]).counts
        [2, 4]
    """
    return LayerSummary(
        "all", [sum(counts) for counts in zip(*(layer.counts for layer in layers), strict=True)]
    )


def read_blip(path: str | Path) -> BLIP:
    """Return the BLIP that a file holds; no code that the file may contain is run.

    Args:
        path: A checkpoint that Lightning saved with BLIP among the callbacks, or a file written by
            ``torch.save(blip.state_dict(), path)``.

    Returns:
        The BLIP, without the network.

    Raises:
        ValueError: If the file cannot be read, holds no state of BLIP, or one of a later version.
    """
    saved = _load(Path(path))
    states = [saved, *saved.get("callbacks", {}).values()] if isinstance(saved, Mapping) else []
    state = next((one for one in states if isinstance(one, Mapping) and one.keys() >= _ENTRIES), None)
    if state is None:
        raise ValueError(
            f"{path} holds no state of BLIP: name a checkpoint that was saved with BLIP among the callbacks"
        )
    try:
        state = upgraded(state)
        blip = BLIP(**state["settings"])
        blip.load_state_dict(state)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return blip


def _load(path: Path) -> Any:
    try:
        path.open("rb").close()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    # An archive that was cut short raises an OSError, too.
    except (EOFError, KeyError, OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        foreign = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        if foreign is None:
            raise ValueError(f"{path} is not a checkpoint, or was cut short when it was written") from error
        raise ValueError(
            f"{path} also holds a {foreign[1]}, perhaps among the hyperparameters, and loading it can run "
            "code: if you trust the file, save BLIP's part alone, "
            'torch.save(torch.load(path, weights_only=False)["callbacks"]["BLIP"], "blip.pt"), '
            "and name blip.pt instead"
        ) from error


def show(path: Path) -> None:
    """Print what is frozen in a checkpoint.

    Args:
        path: The file, see :func:`read_blip`.
    """
    blip = read_blip(path)
    console = Console()
    chosen = ", ".join(f"{name} {value:.3g}" for name, value in blip.chosen.items())
    console.print(f"{blip.tasks_learned} tasks learned, {blip.basis} basis, {chosen}", highlight=False)
    layers = frozen_layers(blip)
    if not layers:
        return
    network = whole_network(layers)
    console.print(_table(layers, network))
    left = 100 * (1 - network.used_capacity)
    console.print(f"Capacity left: {left:.2f} % of {blip.max_bits} bits per value")
    console.print(_histogram(network))


def _table(layers: Sequence[LayerSummary], network: LayerSummary) -> Table:
    titles = ("values", "frozen bits per value", "used capacity %", "values with frozen bits %")
    table = Table("layer", show_footer=len(layers) > 1)
    table.columns[0].footer = network.name
    for title, figure in zip(titles, _figures(network), strict=True):
        table.add_column(title, figure, justify="right")
    for layer in layers:
        table.add_row(layer.name, *_figures(layer))
    return table


def _figures(layer: LayerSummary) -> list[str]:
    shares = (layer.used_capacity, layer.frozen_share)
    return [f"{layer.values:,}", f"{layer.mean_bits:.3f}", *(f"{100 * share:.2f}" for share in shares)]


def _histogram(network: LayerSummary) -> Table:
    """Return the number of values with each number of frozen bits, up to the largest that occurs."""
    most = max(bits for bits, count in enumerate(network.counts) if count)
    table = Table("frozen bits", "", "values", "%", box=None)
    for bits, count in enumerate(network.counts[: most + 1]):
        bar = Bar(max(network.counts), 0, count, width=_BAR_WIDTH)
        table.add_row(str(bits), bar, f"{count:,}", f"{100 * count / network.values:.2f}")
    for column in (table.columns[0], *table.columns[2:]):
        column.justify = "right"
    return table
