"""Draw the frozen bits of one weight and of its layer after each task of a real run."""

from __future__ import annotations

from argparse import ArgumentParser
from dataclasses import dataclass, field
from pathlib import Path

import pytorch_lightning as pl
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from benchmarks.trainer import quiet_trainer
from lightning_blip import BLIP, Task, TaskSequenceDataModule
from lightning_blip.cli.demo import Digits, digits
from lightning_blip.frozen.gains import information_gain
from lightning_blip.frozen.packing import LARGEST_MAX_BITS, bound, cell_codes, encode

LAYER = "network.0.weight"
# The number of a weight's bits in the picture.
_SHOWN = 10
_FROZEN, _FREE, _VALUE = "#3949ab", "#e8eaf6", "#ef6c00"


@dataclass
class Watch(pl.Callback):
    """Collect the information, the frozen bits and the codes of a layer after each task.

    Attributes:
        blip: The BLIP of the same fit, which must come before this callback.
        gained: ½·log2(S_t/S_0) of each weight, in bits, one tensor (weights,) per task.
        bits: The number of frozen bits of each weight, likewise.
        codes: The integer k of each weight θ = k·2^−N·B, likewise.
    """

    blip: BLIP
    gained: list[Tensor] = field(default_factory=list)
    bits: list[Tensor] = field(default_factory=list)
    codes: list[Tensor] = field(default_factory=list)

    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Collect what BLIP has just consolidated."""
        theta = pl_module.get_parameter(LAYER).detach()
        prior = torch.tensor(self.blip.chosen["prior"] * theta.shape[1])
        self.gained.append(information_gain(self.blip.precision()[LAYER].flatten(), prior))
        self.bits.append(self.blip.bits()[LAYER].flatten().int())
        self.codes.append(encode(theta, bound(theta, fan=theta.shape[1]), LARGEST_MAX_BITS).flatten())


def learn(tasks: int = 8, epochs: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """Learn permutations of scikit-learn's digits one after another.

    Args:
        tasks: The number of permutations.
        epochs: The number of epochs per task.

    Returns:
        The information about each weight of the layer after each task, in bits, the number of its frozen
        bits, and its code: all (tasks, weights).
    """
    pl.seed_everything(0, verbose=False)
    # The default prior freezes one bit in 500 after ten tasks: too few to see in a picture.
    blip = BLIP(forgetting_budget=0.01)
    watch = Watch(blip)
    stream = TaskSequenceDataModule.permute_inputs(
        *digits(), tasks=tasks, epochs_per_task=epochs, batch_size=32
    )
    trainer = quiet_trainer([blip, watch], limit_val_batches=0)
    trainer.fit(Digits(tasks, hidden=100, learning_rate=0.3), datamodule=stream)
    return torch.stack(watch.gained), torch.stack(watch.bits), torch.stack(watch.codes)


def leading_bits(codes: Tensor) -> Tensor:
    """Return the most significant bits of θ/B + ⅓ as a binary fraction, which the strict cell freezes.

    Args:
        codes: The codes of values between −B/3 and 2B/3, any shape.

    Returns:
        0 and 1, (…, 10), the most significant bit first.
    """
    places = torch.arange(LARGEST_MAX_BITS - 1, LARGEST_MAX_BITS - 1 - _SHOWN, -1)
    bits: Tensor = (codes + 2**LARGEST_MAX_BITS // 3)[..., None] >> places & 1
    return bits


def draw(gained: Tensor, bits: Tensor, codes: Tensor, path: Path) -> None:
    """Draw the weight whose frozen bits grow at the most boundaries, and below it the layer.

    Args:
        gained: The information after each task, in bits, (tasks, weights).
        bits: The frozen bits after each task, (tasks, weights).
        codes: The codes after each task, (tasks, weights).
        path: The file to write.
    """
    steps = (bits[1:] > bits[:-1]).sum(0)
    fractions = codes / 2**LARGEST_MAX_BITS + 1 / 3
    steps[((fractions < 0) | (fractions >= 1)).any(0)] = -1
    weight = int(steps.argmax())
    figure = Figure(figsize=(9, 7.4), layout="constrained")
    axes = figure.subplot_mosaic(
        [["pattern", "cell"], ["layer", "layer"]], width_ratios=[3, 2], height_ratios=[5, 4]
    )
    _draw_pattern(axes["pattern"], gained[:, weight], bits[:, weight], codes[:, weight])
    _draw_cell(axes["cell"], bits[:, weight], codes[:, weight])
    _draw_layer(axes["layer"], bits)
    figure.savefig(path, dpi=130)


def _draw_pattern(axes: Axes, gained: Tensor, bits: Tensor, codes: Tensor) -> None:
    rows = zip(gained.tolist(), bits.tolist(), leading_bits(codes).tolist(), strict=True)
    for row, (gain, count, pattern) in enumerate(rows):
        for place, digit in enumerate(pattern):
            frozen = place < count
            axes.add_patch(Rectangle((place, row + 0.07), 0.92, 0.86, color=_FROZEN if frozen else _FREE))
            axes.text(
                place + 0.46, row + 0.5, str(digit), ha="center", va="center", family="monospace",
                color="white" if frozen else "0.35",
            )  # fmt: skip
        axes.text(_SHOWN + 1.6, row + 0.5, f"{gain:.2f}", ha="right", va="center")
    axes.text(_SHOWN + 1.6, -0.3, "bits gained", ha="right", va="center")
    axes.text(0, -0.3, "its leading bits, the frozen ones dark", ha="left", va="center")
    _number_the_rows(axes, len(bits))
    axes.set(xlim=(0, _SHOWN + 1.7), ylim=(len(bits), -0.7), xticks=[])
    axes.spines[:].set_visible(False)
    axes.set_title("One weight: its bits")


def _draw_cell(axes: Axes, bits: Tensor, codes: Tensor) -> None:
    cells = torch.stack(cell_codes(codes, bits, LARGEST_MAX_BITS, "strict"))
    edges = (cells / 2**LARGEST_MAX_BITS).T.tolist()
    values = (codes / 2**LARGEST_MAX_BITS).tolist()
    for row, ((low, high), value) in enumerate(zip(edges, values, strict=True)):
        axes.add_patch(Rectangle((low, row + 0.07), high - low, 0.86, color=_FROZEN, alpha=0.35, linewidth=0))
        axes.plot([value, value], [row + 0.07, row + 0.93], color=_VALUE, linewidth=2)
    _number_the_rows(axes, len(bits))
    axes.set(xlim=(-1, 1), ylim=(len(bits), -0.7), ylabel="", xlabel="value / bound (orange: where it is)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title("Where it may still go")


def _draw_layer(axes: Axes, bits: Tensor) -> None:
    most = max(1, int(bits.max()))
    tasks = range(1, 1 + len(bits))
    below = torch.zeros(len(bits))
    for count in range(most, -1, -1):
        share = 100.0 * (bits == count).float().mean(1)
        color = colormaps["viridis_r"](count / most) if count else "0.9"
        axes.bar(tasks, share.numpy(), 0.85, bottom=below.numpy(), color=color, label=str(count))
        below += share
    axes.set(xlabel="tasks learned", ylabel="share of weights in %", ylim=(0, 100), xticks=list(tasks))
    axes.set_title("All weights of the layer: how many leading bits are frozen")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        title="frozen bits", frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True
    )  # from the top, as they are stacked


def _number_the_rows(axes: Axes, tasks: int) -> None:
    axes.set_ylabel("tasks learned")
    axes.set_yticks([row + 0.5 for row in range(tasks)], [str(1 + row) for row in range(tasks)])
    axes.tick_params(left=False)


def main() -> None:
    """Learn and draw."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/frozen_bits.png"), help="file of the picture")
    out = parser.parse_args().out
    draw(*learn(), out)
    print(out)


if __name__ == "__main__":
    main()
