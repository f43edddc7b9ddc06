"""Records of runs that the tests draw."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace

from lightning_blip.results.record import BoundaryRecord, LayerBits, Predicted, RunRecord, Score

#: The name of a task that would break a page which does not escape it.
HOSTILE = '<b>&"x"\'</b>{{ 1 }} $\\frac$'


def record(
    tasks: int = 3,
    blip: bool = True,
    names: list[str] | None = None,
    scale: float = 1.0,
    offset: float = 0.0,
    missing: Collection[tuple[int, int]] = (),
    layers: int = 2,
    metric: str = "val_acc",
) -> RunRecord:
    """Return a record in which each task is validated halfway and at its end, and forgotten a little."""
    names = names or [f"task_{index}" for index in range(tasks)]

    def score(learned: int, task: int, share: float) -> float:
        value = 0.6 + 0.3 * share - 0.4 * (learned - task) / len(names) + 0.001 * task
        return math.nan if (learned, task) in missing else offset + scale * value

    scores = [
        Score(20 * i, 2 * i + int(share), i + share, names[i], names[j], score(i, j, share), share == 1)
        for i in range(len(names))
        for share in (0.5, 1.0)
        for j in range(i + 1)
    ]
    matrix = [
        [score(i, j, 1.0) if j <= i else math.nan for j in range(len(names))] for i in range(len(names))
    ]
    frozen: list[BoundaryRecord] = []
    predicted: list[Predicted] = []
    for i in range(len(names) if blip else 0):
        of = {
            f"body.{layer}": LayerBits(
                1000, (i + 1) * (layer + 1) / 1000, 3.0, [990 - 9 * i, 10 + 8 * i, i, 0, 0]
            )
            for layer in range(layers)
        }
        used = sum(layer.used_capacity for layer in of.values()) / layers
        frozen.append(BoundaryRecord(names[i], used, 0.01 * i, 3.0 * layers, of))
        predicted += [Predicted(i + 0.25, 0.002 * i), Predicted(i + 0.75, 0.001 * i)]
    settings = {
        "blip": {"basis": "kronecker", "pull": "auto", "max_bits": 4} if blip else None,
        "chosen": {"pull": 3.0, "prior": 1e-5} if blip else None,
        "stream": {"tasks": len(names), "epochs": [2] * len(names), "batch_size": 10},
        "hyperparameters": {"optimizer": {"lr": 0.1 if blip else 0.2}, "hidden": 100},
        "versions": {"torch": "2.13.0"},
    }
    return RunRecord(metric, names, matrix, scores, frozen, predicted, settings)


RECORDS: dict[str, RunRecord] = {
    "ordinary": record(),
    "without BLIP": record(blip=False),
    "one task": record(tasks=1),
    "50 tasks": record(tasks=50),
    "many layers": record(layers=30),
    "returns": record(scale=620, offset=-120),
    "12 returns": record(tasks=12, scale=-620, offset=120),
    "negative": record(scale=0.01, offset=-5e5),
    "missing entries": record(missing={(1, 0), (2, 2)}),
    "no positions": replace(
        record(), scores=[replace(score, position=math.nan) for score in record().scores]
    ),
    "nothing finite": record(missing={(i, j) for i in range(3) for j in range(3)}),
    "hostile names": record(names=[HOSTILE, "</svg></script>", "a" * 200], layers=1),
    "unicode names": record(names=["数字を学ぶという長い名前の課題", "žluťoučký kůň", "مهمة", "🙂"]),
}
