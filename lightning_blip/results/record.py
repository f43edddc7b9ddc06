"""The record of a run: all that was measured while a sequence was learned, as a file that tools read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_blip.boundary import BoundaryReport

#: Of what is written.
VERSION = 1
#: The file's name, in the log folder of a run.
RECORD = "forgetting.json"


@dataclass(frozen=True)
class Score:
    """The score on one task at one validation.

    Attributes:
        step: How many optimizer steps were done.
        epoch: The epoch, counted over all tasks from 0.
        position: Where in the sequence, in tasks: i + e/E after e of the E epochs of task i. A boundary lies
            on a whole number, even where a task ended early.
        learning: Name of the task being learned.
        task: Name of the task that was scored.
        score: What the metric gave.
        boundary: Whether the network was just frozen.
    """

    step: int
    epoch: int
    position: float
    learning: str
    task: str
    score: float
    boundary: bool


@dataclass(frozen=True)
class LayerBits:
    """What is frozen in one layer.

    Attributes:
        values: How many parameters, or coordinates, it has.
        used_capacity: Σ bits / Σ N, 0 to 1.
        information_gain: What the task told about it, in bits.
        bits: How many of its values have 0, 1, …, N frozen bits.
    """

    values: int
    used_capacity: float
    information_gain: float
    bits: list[int]


@dataclass(frozen=True)
class Frozen:
    """What is frozen after a boundary.

    Attributes:
        task: Name of the task that was learned.
        used_capacity: Σ bits / Σ N over the network, 0 to 1.
        predicted_forgetting: What learning the task has the past ones forget, in nats a sample.
        information_gain: What the task told, in bits.
        layers: By the name of the module, in the network's order.
    """

    task: str
    used_capacity: float
    predicted_forgetting: float
    information_gain: float
    layers: dict[str, LayerBits]

    @classmethod
    def of(cls, task: str, report: BoundaryReport) -> Frozen:
        """Return the record of what BLIP froze at one boundary.

        Args:
            task: The name of the task.
            report: What BLIP measured and froze.

        Returns:
            The record.

        Example:
            >>> from lightning_blip.boundary import BoundaryReport, LayerReport
            >>> layer = LayerReport(information_gain=4.0, bits=[1, 1, 1])
            >>> report = BoundaryReport(0.0, 0.5, 0.0, 0.5, 0.0, {}, 1.5, {"0": layer})
            >>> Frozen.of("first", report).layers["0"].used_capacity
            0.5
        """
        layers = {
            name: LayerBits(layer.values, layer.used_capacity, layer.information_gain, layer.bits)
            for name, layer in report.layers.items()
        }
        return cls(task, report.used_capacity, report.predicted_forgetting, report.information_gain, layers)

    def share_of_bits(self, layers: Iterable[str]) -> float:
        """The frozen bits of some layers, as a share of all bits of the network.

        Args:
            layers: By name; one that was not there yet has none.

        Returns:
            The share, 0 to 1.

        Example:
            >>> layers = {"0": LayerBits(3, 0.5, 1.0, [0, 3, 0]), "1": LayerBits(1, 1.0, 1.0, [0, 0, 1])}
            >>> Frozen("first", 0.625, 0.0, 2.0, layers).share_of_bits(["0"])
            0.375
        """
        values = sum(layer.values for layer in self.layers.values())
        known = [self.layers[name] for name in layers if name in self.layers]
        return sum(layer.used_capacity * layer.values for layer in known) / values

    def grouped(self, most: int) -> dict[str, list[str]]:
        """The layers with the most frozen bits by themselves, and the others together.

        Args:
            most: How many are by themselves.

        Returns:
            Names of layers by what the group is called: first those by themselves, in the network's order.
        """
        names = list(self.layers)
        largest = sorted(names, key=lambda name: -self.share_of_bits([name]))[:most]
        others = [name for name in names if name not in largest]
        alone = {name: [name] for name in names if name in largest}
        return {**alone, f"{len(others)} others": others} if others else alone

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Frozen:
        """From what ``dataclasses.asdict`` made of it."""
        layers = {name: LayerBits(**layer) for name, layer in plain["layers"].items()}
        return cls(**{**plain, "layers": layers})


@dataclass(frozen=True)
class Predicted:
    """The forgetting that BLIP predicted at one moment of the training.

    Attributes:
        position: As in :class:`Score`.
        forgetting: In nats a sample of each past task.
    """

    position: float
    forgetting: float


@dataclass(frozen=True)
class RunRecord:
    """All that was measured while a sequence was learned; plain values, which a JSON file holds.

    Attributes:
        metric: What was scored; higher is better. Where scores were divided by ceilings, it says so.
        tasks: Names of all tasks of the sequence.
        matrix: R, T rows of T: the score on task j after learning task i, NaN where not measured.
        scores: One for each validation and task seen by then.
        frozen: One for each boundary where BLIP froze something.
        predicted: Forgetting as BLIP predicted it while the tasks were trained.
        settings: ``"blip"`` and ``"chosen"`` (None without BLIP), ``"stream"``, ``"ceilings"`` by task (None
            where scores are as they were logged), ``"hyperparameters"`` of the module, and ``"versions"``.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> record = RunRecord("val_acc", ["first"], [[0.5]], [], [], [], {})
        >>> with TemporaryDirectory() as folder:
        ...     record.write(Path(folder) / "forgetting.json")
        ...     RunRecord.read(Path(folder) / "forgetting.json") == record
        True
    """

    metric: str
    tasks: list[str]
    matrix: list[list[float]]
    scores: list[Score]
    frozen: list[Frozen]
    predicted: list[Predicted]
    settings: dict[str, Any]

    @property
    def seen(self) -> list[str]:
        """Names of the tasks that were scored, in the order in which they were learned."""
        return list(dict.fromkeys(score.task for score in self.scores))

    def write(self, path: str | Path) -> None:
        """Writes it, so that a reader sees all of it or what was there before.

        Args:
            path: Of the JSON file. Numbers that are not finite become null.
        """
        path = Path(path)
        half = path.with_name(f"{path.name}.tmp")
        text = json.dumps(plain({"version": VERSION, **asdict(self)}), allow_nan=False, ensure_ascii=False)
        half.write_text(text + "\n", encoding="utf-8")
        half.replace(path)

    @classmethod
    def read(cls, path: str | Path) -> RunRecord:
        """Reads what :meth:`write` wrote.

        Args:
            path: Of the JSON file.

        Returns:
            The record; NaN stands where the file has null for a number.

        Raises:
            ValueError: If the file is no record, or one of a later version.
        """
        path = Path(path)
        try:
            saved = dict(json.loads(path.read_text(encoding="utf-8")))
            version = saved.pop("version")
            if version > VERSION:
                raise ValueError(
                    f"it is of version {version}, this is version {VERSION}: update lightning-blip"
                )
            settings = saved.pop("settings")
            saved = _with_nan(saved)
            return cls(
                saved["metric"],
                saved["tasks"],
                saved["matrix"],
                [Score(**score) for score in saved["scores"]],
                [Frozen.from_plain(frozen) for frozen in saved["frozen"]],
                [Predicted(**predicted) for predicted in saved["predicted"]],
                settings,
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"path={str(path)!r} holds no record of a run that can be read: {error}"
            ) from error


def plain(value: Any) -> Any:
    """Any value in the types that JSON knows: what is not finite as None, anything else by its name or repr.

    Args:
        value: Such as hyperparameters.

    Returns:
        It, made of dicts, lists, strings, numbers, True, False and None.

    Example:
        >>> plain({"rate": 0.1, "sizes": (2, float("nan")), "activation": math.sqrt})
        {'rate': 0.1, 'sizes': [2, None], 'activation': 'sqrt'}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [plain(part) for part in value]
    return getattr(value, "__name__", None) or repr(value)


def _with_nan(value: Any) -> Any:
    """What was written as null is a number that is not finite: nothing else of a record, but settings, is."""
    if isinstance(value, dict):
        return {name: _with_nan(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_with_nan(part) for part in value]
    return math.nan if value is None else value
