"""What BLIP costs: estimates, training steps and boundaries against the same work without it, and memory."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from backpack import backpack, extend
from backpack.extensions import SumGradSquared
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.machine import machine
from benchmarks.markdown import markdown_table
from benchmarks.memory import held_bytes, peak_bytes
from benchmarks.networks import Classifier, alexnet, mlp, resnet18, resnet50, vit, vit_small
from benchmarks.trainer import quiet_trainer
from lightning_blip import BLIP
from lightning_blip.fisher import diagonal_fisher

Batches = list[tuple[Tensor, Tensor]]
Options = dict[str, Any]
MEBI = 2**20
# Arguments of BLIP.
DIAGONAL: Options = {}
KRONECKER: Options = {"basis": "kronecker"}
LOW_RANK: Options = {"basis": "kronecker", "rank": 256}
# So many steps into a task, pulls have become as rare as they get.
LATE = 1_000_000


@dataclass(frozen=True)
class Case:
    """A network, the shape of its inputs, and how much of each work is timed.

    Of the ``steps`` of a fit BLIP pulls at every ``every``-th, so that few are enough to see a pull; what
    that takes is then counted as often as BLIP pulls by itself.
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
        """Random inputs and labels of ten classes."""
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
# As they are trained on a GPU.
LARGE_RESNET = replace(RESNET, samples=1_024, batch_size=128, step_batch_size=128, steps=40, every=10)
LARGE_VIT = replace(LARGE_RESNET, name="ViT-S", make=vit_small)


def _plain(network: nn.Module, batches: Batches) -> None:
    for x, y in batches:
        network.zero_grad()
        F.cross_entropy(network(x), y).backward()


def _alternating(works: Sequence[Callable[[], object]], repeats: int, device: str) -> list[list[float]]:
    """Seconds of each work, taken in turn so that a slow moment hits all; once before, uncounted."""
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(1 + repeats):
        for work, taken in zip(works, seconds, strict=True):
            start = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
    return [taken[1:] for taken in seconds]


def _row(what: str, others: Sequence[float], ours: Sequence[float]) -> list[str]:
    ratios = sorted(b / a for a, b in zip(others, ours, strict=True))
    return [
        what,
        f"{statistics.median(others) * 1e3:.2f} ms",
        f"{statistics.median(ours) * 1e3:.2f} ms",
        f"{statistics.median(ratios):.2f}",
        f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
    ]


def fisher(case: Case, repeats: int, device: str) -> list[str]:
    """The Fisher estimate against a plain forward and backward pass over the same batches."""
    network = case.make().to(device).eval()
    batches = case.batches(case.samples, case.batch_size, device)
    plain, ours = _alternating(
        (lambda: _plain(network, batches), lambda: diagonal_fisher(network, batches)), repeats, device
    )
    return _row(f"Fisher of {case.samples:,} samples / forward and backward, {case.name}", plain, ours)


def _by_backpack(network: nn.Module, batches: Batches) -> list[Tensor]:
    """The empirical diagonal Fisher information, by BackPACK."""
    totals = [torch.zeros_like(parameter) for parameter in network.parameters()]
    for x, y in batches:
        network.zero_grad()
        with backpack(SumGradSquared()):
            F.cross_entropy(network(x), y, reduction="sum").backward()
        for total, parameter in zip(totals, network.parameters(), strict=True):
            total += parameter.sum_grad_squared  # type: ignore[attr-defined]
    samples = sum(len(y) for _, y in batches)
    return [total.div_(samples) for total in totals]


def against_backpack(case: Case, repeats: int, device: str) -> list[list[str]]:
    """The empirical Fisher information, by us and by BackPACK: time, and the peak of what is allocated."""
    network = case.make().to(device).eval()
    for part in network.modules():
        if isinstance(part, nn.ReLU):
            part.inplace = False  # BackPACK cannot see past it
    extended = extend(case.make().to(device).eval())
    for part in extended.modules():
        if isinstance(part, nn.ReLU):
            part.inplace = False
    extended.load_state_dict(network.state_dict())
    batches = case.batches(case.samples, case.batch_size, device)

    def theirs() -> list[Tensor]:
        return _by_backpack(extended, batches)

    def ours() -> list[Tensor]:
        return list(diagonal_fisher(network, batches, labels="empirical").values())

    for a, b in zip(theirs(), ours(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(a.max()))
    before, after = _alternating((theirs, ours), repeats, device)
    extended.zero_grad()
    peaks = [peak_bytes(theirs), peak_bytes(ours)]
    return [
        _row(f"Fisher of {case.samples:,} samples / BackPACK's SumGradSquared, {case.name}", before, after),
        [
            f"the same, peak memory, {case.name}",
            *(f"{peak / MEBI:.0f} MiB" for peak in peaks),
            f"{peaks[1] / peaks[0]:.2f}",
            "",
        ],
    ]


class _StepTimes(pl.Callback):
    """How long each step takes, from the start of one batch to the start of the next."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last: float | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now


def _call(options: Options) -> str:
    return f"BLIP({', '.join(f'{name}={value!r}' for name, value in options.items())})"


def _seconds_of_a_step(
    case: Case, module: pl.LightningModule, blips: Sequence[BLIP], samples: TensorDataset, device: str
) -> float:
    """One step of a fit, on average: those that pull take part in it as often as BLIP pulls by itself."""
    times = _StepTimes()
    trainer = quiet_trainer(
        [times, *blips], max_epochs=1, accelerator="gpu" if device == "cuda" else "cpu", devices=1
    )
    trainer.fit(module, DataLoader(samples, batch_size=case.step_batch_size))
    warm = list(enumerate(times.seconds, start=1))[case.steps // 4 :]
    pulling = statistics.median(seconds for number, seconds in warm if number % case.every == 0)
    others = statistics.median(seconds for number, seconds in warm if number % case.every)
    return others + (pulling - others) / BLIP().every


def step(case: Case, variants: Sequence[Options], repeats: int, device: str) -> list[list[str]]:
    """One training step late in a task, in the same Lightning Trainer without BLIP and with it, in turn."""
    (batch,) = case.batches(case.step_batch_size, case.step_batch_size, "cpu")
    samples = TensorDataset(*(tensor.repeat(case.steps, *[1] * (tensor.ndim - 1)) for tensor in batch))
    # A boundary may take longer than all that is timed: there is one for each variant, before the first fit.
    fits: list[tuple[pl.LightningModule, list[BLIP]]] = []
    for options in (None, *variants):
        module = Classifier(case.make(), nn.Identity(), partial(torch.optim.SGD, lr=0.01))
        blips = [] if options is None else [BLIP(every=case.every, **options)]
        for blip in blips:
            blip.consolidate(module, [batch])
            for state in map(blip.state, blip.bits()):
                state.pace.total = LATE
        fits.append((module, blips))
    rounds = [
        [_seconds_of_a_step(case, module, blips, samples, device) for module, blips in fits]
        for _ in range(1 + repeats)
    ]
    plain, *ours = zip(*rounds[1:], strict=True)
    return [
        _row(
            f"training step with {_call(options)} / without, {case.name}, batch {case.step_batch_size}",
            plain,
            seconds,
        )
        for options, seconds in zip(variants, ours, strict=True)
    ]


def boundary(case: Case, repeats: int, device: str) -> list[str]:
    """Consolidating a task, but the first, in either basis: the estimate and what is worked out from it."""
    samples = BLIP().samples
    batches = case.batches(samples, case.batch_size, device)
    diagonal, kronecker = (
        partial(BLIP(**options).consolidate, case.make().to(device), batches)
        for options in (DIAGONAL, KRONECKER)
    )
    # The first boundary, where more is chosen than later, is the uncounted one.
    return _row(
        f"boundary of {samples:,} samples with {_call(KRONECKER)} / {_call(DIAGONAL)}, {case.name}",
        *_alternating((diagonal, kronecker), repeats, device),
    )


def kept(case: Case, variants: Sequence[Options]) -> list[str]:
    """How many bytes a parameter each variant keeps from one task to the next."""
    parameters = sum(theta.numel() for theta in case.make().parameters())
    row = [case.name, f"{parameters:,}"]
    for options in variants:
        network, blip = case.make(), BLIP(**options)
        blip.consolidate(network, case.batches(case.batch_size, case.batch_size, "cpu"))
        row.append(f"{held_bytes(blip, network) / parameters:.2f}")
    return row


def resnet50_memory(batch_size: int) -> list[list[str]]:
    """What the estimate allocates on ResNet-50, beside what the forward pass keeps anyway."""
    network = resnet50().eval()
    x, y = torch.randn(batch_size, 3, 224, 224), torch.randint(0, 1000, (batch_size,))
    kept: list[Tensor] = []
    activations = peak_bytes(lambda: kept.append(network(x)))
    kept.clear()
    works = {
        "a forward and a backward pass": lambda: _plain(network, [(x, y)]),
        "the Fisher estimate, its result of 97 MiB included": lambda: diagonal_fisher(network, [(x, y)]),
    }
    rows = []
    for what, work in works.items():
        peak = peak_bytes(work)
        network.zero_grad()
        rows.append([what, f"{peak / MEBI:.0f} MiB", f"{(peak - activations) / MEBI:.0f} MiB"])
    return [[f"the activations, batch {batch_size}", f"{activations / MEBI:.0f} MiB", ""], *rows]


class Comparison(NamedTuple):
    """A table."""

    title: str
    header: list[str]
    rows: list[list[str]]


def _few(repeats: int) -> int:
    """How often to time what takes seconds each time."""
    return max(3, repeats // 3)


def estimates(repeats: int, device: str) -> Comparison:
    """Fisher estimates against plain passes and against BackPACK."""
    few = _few(repeats)
    rows = [
        fisher(MLP, repeats, device),
        fisher(ALEXNET, repeats, device),
        fisher(RESNET, few, device),
        fisher(VIT, few, device),
        *against_backpack(MLP, repeats, device),
        *against_backpack(ALEXNET, few, device),
        *against_backpack(RESNET, few, device),
    ]
    return Comparison("Estimating the Fisher information", TIMES, rows)


def steps(repeats: int, device: str) -> Comparison:
    """Training steps with BLIP against those without."""
    few = _few(repeats)
    rows = [
        *step(MLP, [DIAGONAL], repeats, device),
        *step(NARROW, [DIAGONAL, KRONECKER], repeats, device),
        *step(ALEXNET, [DIAGONAL, KRONECKER, LOW_RANK], repeats, device),
        *step(RESNET, [DIAGONAL], few, device),
        *step(VIT, [DIAGONAL], few, device),
    ]
    return Comparison(f"Training: a step late in a task, where one in {BLIP().every} pulls", TIMES, rows)


def boundaries(repeats: int, device: str) -> Comparison:
    """What a boundary takes in the Kronecker basis against the diagonal one."""
    rows = [boundary(NARROW, repeats, device), boundary(ALEXNET, _few(repeats), device)]
    header = ["what", "diagonal", "kronecker", *TIMES[3:]]
    return Comparison("Boundaries: the estimate and what is worked out from it", header, rows)


def large(repeats: int, device: str) -> Comparison:
    """Networks and batches of a size that takes a GPU."""
    few = _few(repeats)
    rows = []
    for case in (LARGE_RESNET, LARGE_VIT):
        rows.append(fisher(case, few, device))
        rows += step(case, [DIAGONAL, KRONECKER], few, device)
    rows.append(boundary(LARGE_RESNET, 1, device))
    return Comparison("ResNet-18 and ViT-S, batch 128", TIMES, rows)


def states(_repeats: int, _device: str) -> Comparison:
    """What is kept from one task to the next."""
    variants = [DIAGONAL, KRONECKER, LOW_RANK]
    header = ["network", "parameters", *map(_call, variants)]
    rows = [kept(case, variants) for case in (NARROW, ALEXNET)]
    return Comparison("Memory from task to task, bytes a parameter", header, rows)


def estimate_memory(_repeats: int, device: str) -> Comparison:
    """What an estimate allocates, counted on the CPU."""
    header = ["ResNet-50, images of 224x224", "peak", "beside the activations"]
    return Comparison("Memory of an estimate", header, resnet50_memory(8) if device == "cpu" else [])


TIMES = ["what", "without", "with", "ratio (median)", "from … to"]
COMPARISONS: dict[str, Callable[[int, str], Comparison]] = {
    "estimates": estimates,
    "steps": steps,
    "boundaries": boundaries,
    "large": large,
    "states": states,
    "estimate-memory": estimate_memory,
}


def _print(comparison: Comparison, markdown: bool) -> None:
    title, header, rows = comparison
    if markdown:
        print(f"\n{title}\n")
        print(markdown_table(header, rows))
        return
    table = Table(*header, title=title)
    for cells in rows:
        table.add_row(*cells)
    Console().print(table)


def main() -> None:
    """Prints the tables: both sides of each comparison in the same run, medians, and the median ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=COMPARISONS,
        default=[name for name in COMPARISONS if name != "large"],
        help="these tables",
    )
    parser.add_argument("--repeats", type=int, default=11, help="how often each work is timed")
    parser.add_argument("--markdown", action="store_true", help="as benchmarks/README.md holds them")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(f"{machine(arguments.device)}, torch {torch.__version__}")
    for name in arguments.only:
        comparison = COMPARISONS[name](arguments.repeats, arguments.device)
        if comparison.rows:
            _print(comparison, arguments.markdown)


if __name__ == "__main__":
    main()
