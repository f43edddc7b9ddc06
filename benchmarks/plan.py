"""The plan of the results: methods on streams, the search for their settings, and the seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.games import Games
from benchmarks.learning import STREAMS, Run
from benchmarks.methods import METHODS
from benchmarks.protocols import Protocol
from benchmarks.record import Record

# The number of tasks on which settings are searched, with seed 0.
_SEARCH_TASKS = 3
_COMPARED = tuple(name for name in METHODS if name not in ("blip-paper", "single"))


@dataclass(frozen=True)
class Entry:
    """A method on a stream: the search for its setting, if it has one, and then one run per seed.

    Attributes:
        part: The stream.
        method: The name of the method.
    """

    part: Part
    method: str

    @property
    def search(self) -> list[Job]:
        """The runs on the first tasks, one for each value of the setting."""
        method = METHODS[self.method]
        searched = (self.part.searched_on or self.part).protocol
        first = replace(searched, tasks=min(_SEARCH_TASKS, searched.tasks))
        values = self.part.values.get(self.method, method.values)
        return [Job(Run(first, self.method, {str(method.setting): value}), 0) for value in values]

    def seeds_of_best(self, out: Path) -> list[Job]:
        """Return the runs of the whole stream, with the value that had the highest ACC in the search.

        If the whole stream diverges with the best value for any seed, the next best is taken.

        Args:
            out: The folder of the records, which has those of the search.

        Returns:
            One run per seed; none if the stream diverges with every value.
        """
        if not self.search:
            return self.seeds(self.part.blip if self.method.startswith("blip") else {})
        by_score = sorted(self.search, key=lambda job: job.score(out), reverse=True)
        choices = [self.seeds(job.run.settings) for job in by_score]
        stable = [jobs for jobs in choices if not any(job.diverged(out).exists() for job in jobs)]
        return stable[0] if stable else []

    def left(self, out: Path) -> list[Job]:
        """Return the runs that can start now: of the search if it has not ended, otherwise of the seeds."""
        return _not_ended(self.search, out) or _not_ended(self.seeds_of_best(out), out)

    def to_come(self, out: Path) -> list[Job]:
        """Return all runs that have not ended; those of the seeds have no setting before the search ends."""
        search = _not_ended(self.search, out)
        return [*search, *self.seeds({})] if search else self.left(out)

    def seeds(self, settings: dict[str, Any]) -> list[Job]:
        """Return the runs of the whole stream with these settings."""
        run = Run(self.part.protocol, self.method, settings)
        return [Job(run, seed) for seed in range(self.part.seeds)]


@dataclass(frozen=True)
class Job:
    """A run with one seed."""

    run: Run
    seed: int

    @property
    def epochs(self) -> int:
        """The number of epochs, over all tasks."""
        return self.run.protocol.tasks * self.run.protocol.epochs

    def path(self, out: Path) -> Path:
        """Return the file of its record."""
        return self.run.path(out, self.seed)

    def diverged(self, out: Path) -> Path:
        """Return the file that stands for the record if it diverged."""
        return self.run.diverged(out, self.seed)

    def ended(self, out: Path) -> bool:
        """Return whether it has a record or has diverged."""
        return self.path(out).exists() or self.diverged(out).exists()

    def score(self, out: Path) -> float:
        """Return its ACC, in %; less than any other score if it diverged."""
        return -1.0 if self.diverged(out).exists() else Record.read(self.path(out)).ACC


def _not_ended(jobs: Sequence[Job], out: Path) -> list[Job]:
    return [job for job in jobs if not job.ended(out)]


@dataclass(frozen=True)
class Part:
    """A stream in the results.

    Attributes:
        stream: The name of the stream.
        seeds: The number of seeds.
        epochs: The number of epochs per task, if not the stream's.
        methods: The names of the methods.
        values: The values that the searches try, by method, if not the usual ones.
        searched_on: The part on whose first tasks the settings are searched, if not this one.
        blip: Arguments of BLIP, if it does not run at its defaults.
        behind: The reason why another method is ahead of BLIP, if one is.
    """

    stream: str
    seeds: int = 3
    epochs: int | None = None
    methods: tuple[str, ...] = _COMPARED
    values: Mapping[str, Sequence[float]] = field(default_factory=dict)
    searched_on: Part | None = None
    blip: dict[str, Any] = field(default_factory=dict)
    behind: str = ""

    @property
    def protocol(self) -> Protocol | Games:
        """The stream with the number of epochs of this part."""
        usual = STREAMS[self.stream]
        return replace(usual, epochs=self.epochs or usual.epochs)

    @property
    def entries(self) -> list[Entry]:
        """One entry per method."""
        return [Entry(self, method) for method in self.methods]


# These records were made before smoothing=0.1 became the default.
_CIFAR10 = Part("split_cifar10", blip={"smoothing": 0.02})
_CIFAR10_SHORT = Part("split_cifar10", seeds=1, epochs=1)

_PLAYERS = ("single", "finetune", "ewc", "blip", "blip-kronecker")
# From the 5,000 of the paper downwards.
_OF_PLAYERS = {"ewc": (5_000, 50, 5, 0.5)}

#: All parts of the results, by table: streams for two cores in three hours, longer ones, games for two
#: cores, and streams for a GPU.
PARTS: dict[str, tuple[Part, ...]] = {
    "cpu": (
        Part("split_mnist"),
        Part("split_mnist_domain"),
        Part("split_fashion"),
        Part("rotated_mnist"),
        Part("permuted_mnist"),
        Part(
            "permuted_mnist_heads",
            epochs=1,
            behind="With a head per task SGD forgets almost nothing in one epoch, so that no method can win "
            "by preventing it. Adam forgets 12.6 points, and BLIP is far ahead: see "
            "`permuted_mnist_heads_adam`.",
        ),
        _CIFAR10_SHORT,
        # It has only the three tasks that a search would take.
        Part("three_sets", seeds=1, epochs=1, searched_on=_CIFAR10_SHORT),
    ),
    "long": (
        # Checks baselines against published figures.
        Part(
            "split_mnist_domain_drawn",
            methods=("finetune", "ewc", "si", "lwf", "blip", "blip-kronecker", "joint"),
        ),
        Part("permuted_mnist_20", methods=("blip-kronecker",)),
        Part(
            "permuted_mnist_heads",
            methods=("finetune", "blip", "blip-kronecker"),
            behind="With a head per task SGD forgets almost nothing.",
        ),
        Part(
            "permuted_mnist_heads_adam",
            seeds=1,
            methods=("finetune", "blip", "blip-kronecker"),
        ),
    ),
    "games": (
        Part(
            "cartpole",
            methods=_PLAYERS,
            values=_OF_PLAYERS,
            behind="Every method that protects the body keeps the earlier tasks: the stream shows that they "
            "are kept, not which method is best.",
        ),
        Part("minatar", methods=_PLAYERS, values=_OF_PLAYERS),
    ),
    "cuda": (_CIFAR10, Part("three_sets", searched_on=_CIFAR10)),
}
