"""Ten permutations of MNIST on one shared head, in a loop of plain PyTorch: a hard stream for any setting."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from benchmarks import data
from benchmarks.networks import mlp
from lightning_blip import BLIP
from lightning_blip.metrics import average_score, backward_transfer
from lightning_blip.streams import MappedDataset, permute_inputs


def _tensors(samples: object) -> tuple[Tensor, Tensor]:
    assert isinstance(samples, MappedDataset)
    return samples.batch(torch.arange(len(samples)))


def run(train: TensorDataset, test: TensorDataset, blip: BLIP, tasks: int, epochs: int, seed: int) -> Tensor:
    """Learns the stream with SGD 0.01, batch 10, MLP 784-100-100-10, and prints where it is.

    Returns:
        R (tasks, tasks), in %.
    """
    torch.manual_seed(seed)
    network = nn.Sequential(mlp(784, 100, 100), nn.Linear(100, 10))
    matrix = torch.full((tasks, tasks), torch.nan)
    stream = permute_inputs(train, test, tasks, seed)
    start = time.perf_counter()
    for learned, task in enumerate(stream):
        optimizer = blip.wrap(torch.optim.SGD(network.parameters(), lr=0.01), network)
        x, y = _tensors(task.train)
        for _ in range(epochs):
            order: tuple[Tensor, ...] = torch.randperm(len(x)).split(10)
            for batch in order:
                optimizer.zero_grad()
                F.cross_entropy(network(x[batch]), y[batch]).backward()
                optimizer.step()
        blip.consolidate(network, ((x[batch], y[batch]) for batch in torch.randperm(len(x)).split(500)))
        for past in range(learned + 1):
            inputs, labels = _tensors(stream[past].test)
            with torch.no_grad():
                matrix[learned, past] = (network(inputs).argmax(1) == labels).float().mean() * 100
        print(
            f"task {learned}: mean {float(average_score(matrix)):.2f} %, "
            f"just learned {float(matrix[learned, learned]):.2f} %, capacity used {blip.used_capacity:.1%}, "
            f"{time.perf_counter() - start:.0f} s",
            flush=True,
        )
    return matrix


def main() -> None:
    """Prints ACC and BWT of one setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with mnist.npz")
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=5, help="of each task")
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.add_argument_group("of BLIP; its own default where not given")
    for name, kind in (("prior", float), ("scale", float), ("pull", float), ("rule", str), ("cell", str)):
        settings.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS)
    given = vars(parser.parse_args())
    folder, tasks, epochs, seed = (given.pop(name) for name in ("data", "tasks", "epochs", "seed"))
    blip = BLIP(**given)
    train, test = data.load(folder, "mnist")
    matrix = run(train, test, blip, tasks, epochs, seed)
    print(
        f"prior {blip.prior:g}, rule {blip.rule}, cell {blip.cell}, p {blip.scale:g}, λ {blip.pull:g}, "
        f"seed {seed}: ACC {float(average_score(matrix)):.2f} %, "
        f"BWT {float(backward_transfer(matrix)):+.2f} %"
    )


if __name__ == "__main__":
    main()
