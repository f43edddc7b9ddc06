"""Draws how bits freeze: those of one weight and of its whole layer, after each task of a real run."""

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
# So many of a weight's bits fit into the picture.
_SHOWN = 10
_FROZEN, _FREE, _VALUE = "#3949ab", "#e8eaf6", "#ef6c00"


@dataclass
class Watch(pl.Callback):
    """Keeps what is known of a layer, and its codes on the grid of N bits, as each task leaves them.

    Attributes:
        blip: It has to come before this one among the callbacks.
        gained: ½·log2(S_t/S_0) of each weight, in bits, one tensor (weights,) a task.
        bits: How many are frozen of each.
        codes: Those of the weights, k of θ = k·2^−N·B.
    """

    blip: BLIP
    gained: list[Tensor] = field(default_factory=list)
    bits: list[Tensor] = field(default_factory=list)
    codes: list[Tensor] = field(default_factory=list)

    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Takes down what BLIP has just made of the task."""
        theta = pl_module.get_parameter(LAYER).detach()
        prior = torch.tensor(self.blip.chosen["prior"] * theta.shape[1])
        self.gained.append(information_gain(self.blip.precision()[LAYER].flatten(), prior))
        self.bits.append(self.blip.bits()[LAYER].flatten().int())
        self.codes.append(encode(theta, bound(theta, fan=theta.shape[1]), LARGEST_MAX_BITS).flatten())


def learn(tasks: int = 8, epochs: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """Learns permutations of scikit-learn's digits one after another.

    Args:
        tasks: How many.
        epochs: How long each.

    Returns:
        What was gained of each weight of the layer by the end of each task, in bits, how many of its bits are
        frozen, and its code: all (tasks, weights).
    """
    pl.seed_everything(0, verbose=False)
    # At the default prior one bit in 500 is frozen after ten tasks: too few to be seen.
    blip = BLIP(forgetting_budget=0.01)
    watch = Watch(blip)
    stream = TaskSequenceDataModule.permute_inputs(
        *digits(), tasks=tasks, epochs_per_task=epochs, batch_size=32
    )
    trainer = quiet_trainer([blip, watch], limit_val_batches=0)
    trainer.fit(Digits(tasks, hidden=100, learning_rate=0.3), datamodule=stream)
    return torch.stack(watch.gained), torch.stack(watch.bits), torch.stack(watch.codes)


def leading_bits(codes: Tensor) -> Tensor:
    """The first bits of θ/B + ⅓ as binary fractions: what the strict cell freezes from the left.

    Args:
        codes: Of the values, any shape.

    Returns:
        (…, 10) of 0 and 1, for values between −B/3 and 2B/3.
    """
    places = torch.arange(LARGEST_MAX_BITS - 1, LARGEST_MAX_BITS - 1 - _SHOWN, -1)
    bits: Tensor = (codes + 2**LARGEST_MAX_BITS // 3)[..., None] >> places & 1
    return bits


def draw(gained: Tensor, bits: Tensor, codes: Tensor, path: Path) -> None:
    """Draws the weight whose bits grow in the most steps, and below it the layer.

    Args:
        gained: By the end of each task, in bits, (tasks, weights).
        bits: Frozen ones after each task, (tasks, weights).
        codes: After each task, (tasks, weights).
        path: Of the picture.
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
    """Learns and draws."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("docs/frozen_bits.png"), help="where the picture goes"
    )
    out = parser.parse_args().out
    draw(*learn(), out)
    print(out)


if __name__ == "__main__":
    main()
