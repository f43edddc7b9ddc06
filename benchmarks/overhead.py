"""What BLIP costs: the Fisher estimate and the training step, each against the same work without it."""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.networks import Classifier, alexnet, mlp
from benchmarks.trainer import quiet_trainer
from lightning_blip import BLIP
from lightning_blip.fisher import diagonal_fisher

Batches = list[tuple[Tensor, Tensor]]


def _network(name: str) -> nn.Module:
    if name == "MLP 784-1200":
        return nn.Sequential(mlp(784, 1200), nn.Linear(1200, 10))
    return nn.Sequential(alexnet(), nn.Linear(2048, 10))


def _batches(name: str, samples: int, batch_size: int) -> Batches:
    shape = (784,) if name == "MLP 784-1200" else (3, 32, 32)
    x, y = torch.randn(samples, *shape), torch.randint(0, 10, (samples,))
    return list(zip(x.split(batch_size), y.split(batch_size), strict=True))


def _alternating(works: Iterable[Callable[[], None]], repeats: int) -> list[list[float]]:
    """Seconds of each work, taken in turn so that a slow moment hits all."""
    works = list(works)
    for work in works:
        work()
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for work, taken in zip(works, seconds, strict=True):
            start = time.perf_counter()
            work()
            taken.append(time.perf_counter() - start)
    return seconds


def _row(what: str, plain: list[float], ours: list[float]) -> None:
    ratio = statistics.median(b / a for a, b in zip(plain, ours, strict=True))
    print(
        f"| {what} | {statistics.median(plain) * 1e3:.2f} ms | {statistics.median(ours) * 1e3:.2f} ms "
        f"| {ratio:.2f} |"
    )


def fisher(name: str, samples: int, batch_size: int, repeats: int) -> None:
    """The Fisher estimate against a plain forward and backward pass over the same batches."""
    network = _network(name).eval()
    batches = _batches(name, samples, batch_size)

    def plain() -> None:
        for x, y in batches:
            network.zero_grad()
            F.cross_entropy(network(x), y).backward()

    def ours() -> None:
        diagonal_fisher(network, batches)

    before, after = _alternating((plain, ours), repeats)
    _row(f"Fisher of {samples:,} samples, {name}", before, after)


def bare_step(name: str, batch_size: int, repeats: int) -> None:
    """One training step of plain PyTorch, with SGD, against the same step with BLIP's optimizer."""
    batches = _batches(name, batch_size, batch_size)

    def step_of(blip: BLIP | None) -> Callable[[], None]:
        network = _network(name)
        optimizer: torch.optim.Optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
        if blip is not None:
            blip.consolidate(network, batches)
            optimizer = blip.wrap(optimizer, network)
            network.train()

        def step() -> None:
            for x, y in batches:
                optimizer.zero_grad()
                F.cross_entropy(network(x), y).backward()
                optimizer.step()

        return step

    plain, ours, paper = _alternating((step_of(None), step_of(BLIP()), step_of(BLIP.paper())), repeats)
    _row(f"bare training step, {name}, BLIP()", plain, ours)
    _row(f"bare training step, {name}, BLIP.paper()", plain, paper)


class _StepTimes(pl.Callback):
    """How long each step takes, from the start of one batch to the start of the next."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last: float | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now


def trainer_step(name: str, batch_size: int, repeats: int) -> None:
    """One training step within the same Lightning Trainer, without BLIP and with it, in turn."""
    inputs, targets = (torch.cat(part) for part in zip(*_batches(name, batch_size, batch_size), strict=True))
    steps = 40

    def seconds_of(blip: BLIP | None) -> float:
        network = _network(name)
        module = Classifier(network, nn.Identity(), partial(torch.optim.SGD, lr=0.01))
        if blip is not None:
            blip.consolidate(module, [(inputs, targets)])
        times = _StepTimes()
        callbacks: list[pl.Callback] = [times] if blip is None else [times, blip]
        trainer = quiet_trainer(callbacks, max_epochs=1, limit_train_batches=steps)
        samples = TensorDataset(inputs.repeat(steps, *[1] * (inputs.ndim - 1)), targets.repeat(steps))
        trainer.fit(module, DataLoader(samples, batch_size=batch_size))
        return statistics.median(times.seconds[steps // 4 :])

    for blip in (None, BLIP()):
        seconds_of(blip)
    plain, ours = [], []
    for _ in range(repeats):
        plain.append(seconds_of(None))
        ours.append(seconds_of(BLIP()))
    _row(f"training step in a Trainer, {name}, BLIP()", plain, ours)


def main() -> None:
    """Prints one table: both sides of each comparison in the same run, medians, and the median ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    torch.manual_seed(0)
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print()
    print("| what | without | with BLIP | ratio |")
    print("| --- | --- | --- | --- |")
    fisher("MLP 784-1200", 1000, 100, repeats)
    fisher("AlexNet", 200, 50, repeats)
    for name in ("MLP 784-1200", "AlexNet"):
        bare_step(name, 64, 4 * repeats)
        trainer_step(name, 64, repeats)


if __name__ == "__main__":
    main()
