"""The colours of all charts, which readers tell apart without red or green, on light and on dark pages."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib import colormaps
from matplotlib.colors import to_hex, to_rgb

#: The colour map of scores in a heat map, of matplotlib.
HEAT = "viridis"
# The hues of Okabe and Ito's palette.
_RUNS = (
    ("#0072b2", "#56b4e9"),
    ("#d55e00", "#f08030"),
    ("#008a64", "#2fc096"),
    ("#b5568f", "#dd95c2"),
    ("#a87400", "#e6b422"),
    ("#5a6270", "#b4bbc7"),
)


@dataclass(frozen=True)
class Colour:
    """A colour for a light page, and one for a dark page.

    Example:
        >>> Colour("#0072b2", "#56b4e9").on("#000000")
        '#56b4e9'
    """

    light: str
    dark: str

    def on(self, background: object) -> str:
        """Return the one of the two that is read on a background, which is any colour of matplotlib."""
        return self.dark if is_dark(background) else self.light


def run_colour(index: int) -> Colour:
    """Return the colour of a run; six runs differ, then the colours repeat.

    Args:
        index: The place of the run among those compared, from 0.
    """
    return Colour(*_RUNS[index % len(_RUNS)])


def task_colour(index: int, tasks: int) -> Colour:
    """Return the colour of a task, which shows the task's place in the sequence.

    Args:
        index: The place in the sequence, from 0.
        tasks: The number of tasks.
    """
    share = index / max(1, tasks - 1)
    return Colour(_of_map("plasma", 0.62 * share), _of_map("plasma", 0.42 + 0.53 * share))


def layer_colour(index: int, layers: int) -> Colour:
    """Return the colour of a layer, which shows the layer's place in the network.

    Args:
        index: The place in the network, from 0.
        layers: The number of layers shown.
    """
    share = index / max(1, layers - 1)
    return Colour(_of_map("viridis", 0.05 + 0.54 * share), _of_map("viridis", 0.35 + 0.6 * share))


def heat_colour(share: float) -> tuple[str, str]:
    """Return the colour of a cell in a heat map, and the colour of a number written on it.

    Args:
        share: The place of the cell's value on the scale, 0 to 1.
    """
    fill = _of_map(HEAT, share)
    return fill, "#fff" if is_dark(fill) else "#000"


def is_dark(colour: object) -> bool:
    """Return whether white is read better on a colour than black.

    Args:
        colour: Any colour of matplotlib.

    Example:
        >>> is_dark("#14171c"), is_dark((1.0, 1.0, 1.0, 1.0))
        (True, False)
    """
    red, green, blue = to_rgb(colour)  # type: ignore[arg-type]
    return bool(0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 < 0.18)


def _of_map(name: str, share: float) -> str:
    return to_hex(colormaps[name](share))
