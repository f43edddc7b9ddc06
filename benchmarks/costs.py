"""Measurements of what BLIP costs in time and memory, each beside the same work without it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from backpack import backpack, extend
from backpack.extensions import SumGradSquared
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.cases import Batches, Case
from benchmarks.memory import held_bytes, peak_bytes
from benchmarks.networks import Classifier, resnet50
from benchmarks.trainer import quiet_trainer
from lightning_blip import BLIP
from lightning_blip.fisher import diagonal_fisher

Options = dict[str, Any]
# Arguments of BLIP.
DIAGONAL: Options = {}
KRONECKER: Options = {"basis": "kronecker"}
LOW_RANK: Options = {"basis": "kronecker", "rank": 256}

_MEBI = 2**20
# After this many steps of a task, pulls have reached their lowest rate.
_LATE = 1_000_000


def _plain(network: nn.Module, batches: Batches) -> None:
    for x, y in batches:
        network.zero_grad()
        F.cross_entropy(network(x), y).backward()


def _alternating(works: Sequence[Callable[[], object]], repeats: int, device: str) -> list[list[float]]:
    """Return the seconds of each function, called in turn so that a slow moment hits all, after a warm-up."""
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
    """Time the Fisher estimate against a plain forward and backward pass over the same batches."""
    network = case.make().to(device).eval()
    batches = case.batches(case.samples, case.batch_size, device)
    plain, ours = _alternating(
        (lambda: _plain(network, batches), lambda: diagonal_fisher(network, batches)), repeats, device
    )
    return _row(f"Fisher of {case.samples:,} samples / forward and backward, {case.name}", plain, ours)


def _by_backpack(network: nn.Module, batches: Batches) -> list[Tensor]:
    """Return the empirical diagonal Fisher information, computed by BackPACK."""
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
    """Compare time and peak memory of the empirical Fisher information, by BackPACK and here."""
    network = case.make().to(device).eval()
    for part in network.modules():
        if isinstance(part, nn.ReLU):
            part.inplace = False  # BackPACK does not support it
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
            *(f"{peak / _MEBI:.0f} MiB" for peak in peaks),
            f"{peaks[1] / peaks[0]:.2f}",
            "",
        ],
    ]


class _StepTimes(pl.Callback):
    """Collect the duration of each step, from the start of one batch to the start of the next."""

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


def call(options: Options) -> str:
    """Return the call that makes a BLIP with these arguments, as text."""
    return f"BLIP({', '.join(f'{name}={value!r}' for name, value in options.items())})"


def _seconds_of_a_step(
    case: Case, module: pl.LightningModule, blips: Sequence[BLIP], samples: TensorDataset, device: str
) -> float:
    """Return the seconds of an average step, with as many pulls as in BLIP at its defaults."""
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
    """Time a training step late in a task, in the same Trainer, without BLIP and with it in turn."""
    (batch,) = case.batches(case.step_batch_size, case.step_batch_size, "cpu")
    samples = TensorDataset(*(tensor.repeat(case.steps, *[1] * (tensor.ndim - 1)) for tensor in batch))
    # A boundary may take longer than everything that is timed: each variant has one, before the first fit.
    fits: list[tuple[pl.LightningModule, list[BLIP]]] = []
    for options in (None, *variants):
        module = Classifier(case.make(), nn.Identity(), partial(torch.optim.SGD, lr=0.01))
        blips = [] if options is None else [BLIP(every=case.every, **options)]
        for blip in blips:
            blip.consolidate(module, [batch])
            for state in map(blip.state, blip.bits()):
                state.pace.total = _LATE
        fits.append((module, blips))
    rounds = [
        [_seconds_of_a_step(case, module, blips, samples, device) for module, blips in fits]
        for _ in range(1 + repeats)
    ]
    plain, *ours = zip(*rounds[1:], strict=True)
    return [
        _row(
            f"training step with {call(options)} / without, {case.name}, batch {case.step_batch_size}",
            plain,
            seconds,
        )
        for options, seconds in zip(variants, ours, strict=True)
    ]


def boundary(case: Case, repeats: int, device: str) -> list[str]:
    """Time the consolidation of a task after the first, in both bases."""
    samples = BLIP().samples
    batches = case.batches(samples, case.batch_size, device)
    diagonal, kronecker = (
        partial(BLIP(**options).consolidate, case.make().to(device), batches)
        for options in (DIAGONAL, KRONECKER)
    )
    # The first boundary, which also chooses settings, is the warm-up.
    return _row(
        f"boundary of {samples:,} samples with {call(KRONECKER)} / {call(DIAGONAL)}, {case.name}",
        *_alternating((diagonal, kronecker), repeats, device),
    )


def kept(case: Case, variants: Sequence[Options]) -> list[str]:
    """Measure how many bytes per parameter each variant keeps from one task to the next."""
    parameters = sum(theta.numel() for theta in case.make().parameters())
    row = [case.name, f"{parameters:,}"]
    for options in variants:
        network, blip = case.make(), BLIP(**options)
        blip.consolidate(network, case.batches(case.batch_size, case.batch_size, "cpu"))
        row.append(f"{held_bytes(blip, network) / parameters:.2f}")
    return row


def resnet50_memory(batch_size: int) -> list[list[str]]:
    """Measure what the estimate allocates on ResNet-50, beside what a forward pass keeps."""
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
        rows.append([what, f"{peak / _MEBI:.0f} MiB", f"{(peak - activations) / _MEBI:.0f} MiB"])
    return [[f"the activations, batch {batch_size}", f"{activations / _MEBI:.0f} MiB", ""], *rows]
