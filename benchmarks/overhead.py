"""Print what BLIP costs in estimates, training steps, boundaries and memory, beside work without it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.cases import ALEXNET, LARGE_RESNET, LARGE_VIT, MLP, NARROW, RESNET, VIT
from benchmarks.costs import (
    DIAGONAL,
    KRONECKER,
    LOW_RANK,
    against_backpack,
    boundary,
    call,
    fisher,
    kept,
    resnet50_memory,
    step,
)
from benchmarks.machine import machine
from benchmarks.markdown import markdown_table
from lightning_blip import BLIP


class Comparison(NamedTuple):
    """A table of measurements."""

    title: str
    header: list[str]
    rows: list[list[str]]


def _few(repeats: int) -> int:
    """Return the number of repeats for work that takes seconds."""
    return max(3, repeats // 3)


def estimates(repeats: int, device: str) -> Comparison:
    """Compare Fisher estimates with plain passes and with BackPACK."""
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
    """Compare training steps with BLIP and without."""
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
    """Compare a boundary in the Kronecker basis with one in the diagonal basis."""
    rows = [boundary(NARROW, repeats, device), boundary(ALEXNET, _few(repeats), device)]
    header = ["what", "diagonal", "kronecker", *TIMES[3:]]
    return Comparison("Boundaries: the estimate and what is computed from it", header, rows)


def large(repeats: int, device: str) -> Comparison:
    """Compare steps, estimates and boundaries of networks and batches for a GPU."""
    few = _few(repeats)
    rows = []
    for case in (LARGE_RESNET, LARGE_VIT):
        rows.append(fisher(case, few, device))
        rows += step(case, [DIAGONAL, KRONECKER], few, device)
    rows.append(boundary(LARGE_RESNET, 1, device))
    return Comparison("ResNet-18 and ViT-S, batch 128", TIMES, rows)


def states(_repeats: int, _device: str) -> Comparison:
    """Measure what is kept from one task to the next."""
    variants = [DIAGONAL, KRONECKER, LOW_RANK]
    header = ["network", "parameters", *map(call, variants)]
    rows = [kept(case, variants) for case in (NARROW, ALEXNET)]
    return Comparison("Memory from task to task, bytes per parameter", header, rows)


def estimate_memory(_repeats: int, device: str) -> Comparison:
    """Measure what an estimate allocates, on the CPU."""
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
    """Print the tables: medians of both sides of each comparison in the same run, and the median ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=COMPARISONS,
        default=[name for name in COMPARISONS if name != "large"],
        help="the tables to print",
    )
    parser.add_argument("--repeats", type=int, default=11, help="number of times that each work is timed")
    parser.add_argument("--markdown", action="store_true", help="in the form of benchmarks/README.md")
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
