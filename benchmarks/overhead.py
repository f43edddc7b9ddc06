"""What BLIP costs: the Fisher estimate and the training step, each against the same work without it."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

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
from benchmarks.memory import peak_bytes
from benchmarks.networks import Classifier, alexnet, mlp, resnet18, resnet50, vit
from benchmarks.trainer import quiet_trainer
from lightning_blip import BLIP
from lightning_blip.fisher import diagonal_fisher

Batches = list[tuple[Tensor, Tensor]]
MEBI = 2**20


@dataclass(frozen=True)
class Case:
    """A network, the shape of its inputs, and how much of each work is timed."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    samples: int
    batch_size: int
    step_batch_size: int
    steps: int

    def batches(self, samples: int, batch_size: int, device: str) -> Batches:
        """Random inputs and labels of ten classes."""
        x = torch.randn(samples, *self.shape, device=device)
        y = torch.randint(0, 10, (samples,), device=device)
        return list(zip(x.split(batch_size), y.split(batch_size), strict=True))


MLP = Case(
    "MLP 784-1200", lambda: nn.Sequential(mlp(784, 1200), nn.Linear(1200, 10)), (784,), 1000, 100, 64, 60
)
ALEXNET = Case("AlexNet", lambda: nn.Sequential(alexnet(), nn.Linear(2048, 10)), (3, 32, 32), 200, 50, 64, 20)
RESNET = Case("ResNet-18", resnet18, (3, 32, 32), 64, 32, 64, 4)
VIT = Case("ViT", vit, (3, 32, 32), 64, 32, 64, 6)


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


def step(case: Case, repeats: int, device: str) -> list[str]:
    """One training step within the same Lightning Trainer, without BLIP and with it, in turn."""
    ((inputs, targets),) = case.batches(case.step_batch_size, case.step_batch_size, "cpu")
    samples = TensorDataset(inputs.repeat(case.steps, *[1] * (inputs.ndim - 1)), targets.repeat(case.steps))

    def seconds_of(blip: BLIP | None) -> float:
        module = Classifier(case.make(), nn.Identity(), partial(torch.optim.SGD, lr=0.01))
        if blip is not None:
            blip.consolidate(module, [(inputs, targets)])
        times = _StepTimes()
        callbacks: list[pl.Callback] = [times] if blip is None else [times, blip]
        trainer = quiet_trainer(
            callbacks, max_epochs=1, accelerator="gpu" if device == "cuda" else "cpu", devices=1
        )
        trainer.fit(module, DataLoader(samples, batch_size=case.step_batch_size))
        return statistics.median(times.seconds[case.steps // 4 :])

    for blip in (None, BLIP()):
        seconds_of(blip)
    plain, ours = [], []
    for _ in range(repeats):
        plain.append(seconds_of(None))
        ours.append(seconds_of(BLIP()))
    return _row(
        f"training step with BLIP() / without, {case.name}, batch {case.step_batch_size}", plain, ours
    )


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


def _print(title: str, header: list[str], rows: list[list[str]], markdown: bool) -> None:
    if markdown:
        print(f"\n{title}\n")
        for cells in (header, ["---"] * len(header), *rows):
            print(f"| {' | '.join(cells)} |")
        return
    table = Table(*header, title=title)
    for cells in rows:
        table.add_row(*cells)
    Console().print(table)


def main() -> None:
    """Prints the tables: both sides of each comparison in the same run, medians, and the median ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=11, help="how often each work is timed")
    parser.add_argument("--markdown", action="store_true", help="as benchmarks/README.md holds them")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    repeats, device = arguments.repeats, arguments.device
    few = max(3, repeats // 3)  # of what takes seconds each time
    torch.manual_seed(0)
    print(f"{machine(device)}, torch {torch.__version__}")
    header = ["what", "without", "with", "ratio (median)", "from … to"]
    estimates = [
        fisher(MLP, repeats, device),
        fisher(ALEXNET, repeats, device),
        fisher(RESNET, few, device),
        fisher(VIT, few, device),
        *against_backpack(MLP, repeats, device),
        *against_backpack(ALEXNET, few, device),
        *against_backpack(RESNET, few, device),
    ]
    _print("Estimating the Fisher information", header, estimates, arguments.markdown)
    steps = [
        step(MLP, repeats, device),
        step(ALEXNET, repeats, device),
        step(RESNET, few, device),
        step(VIT, few, device),
    ]
    _print("Training", header, steps, arguments.markdown)
    if device == "cpu":
        header = ["ResNet-50, images of 224x224", "peak", "beside the activations"]
        _print("Memory of an estimate", header, resnet50_memory(8), arguments.markdown)


if __name__ == "__main__":
    main()
