"""The record of a run: all that was measured while a sequence was learned, as a file that tools read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_blip.boundary import BoundaryReport

#: The version of the file's format.
VERSION = 1
#: The name of the file, in the log folder of a run.
RECORD = "forgetting.json"


@dataclass(frozen=True)
class Score:
    """The score on one task at one validation.

    Attributes:
        step: The number of optimizer steps that were done.
        epoch: The epoch, counted over all tasks from 0.
        position: The position in the sequence, in tasks: i + e/E after e of the E epochs of task i. A
            boundary lies on a whole number, even where a task ended early.
        learning: The name of the task being learned.
        task: The name of the task that was scored.
        score: The value of the metric.
        boundary: Whether bits had just been frozen.
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
        values: The number of parameters, or of coordinates in the Kronecker basis.
        used_capacity: Σ bits / Σ N, 0 to 1.
        information_gain: What the task added to the layer's information, in bits.
        bits: The number of values with 0, 1, …, N frozen bits.
    """

    values: int
    used_capacity: float
    information_gain: float
    bits: list[int]


@dataclass(frozen=True)
class BoundaryRecord:
    """What is frozen after a boundary.

    Attributes:
        task: The name of the task that was learned.
        used_capacity: Σ bits / Σ N over the network, 0 to 1.
        predicted_forgetting: The predicted rise of the past tasks' loss by learning the task, in nats per
            sample.
        information_gain: What the task added to the network's information, in bits.
        layers: One entry per layer, by the name of its module, in the network's order.
    """

    task: str
    used_capacity: float
    predicted_forgetting: float
    information_gain: float
    layers: dict[str, LayerBits]

    @classmethod
    def of(cls, task: str, report: BoundaryReport) -> BoundaryRecord:
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
            >>> BoundaryRecord.of("first", report).layers["0"].used_capacity
            0.5
        """
        layers = {
            name: LayerBits(layer.values, layer.used_capacity, layer.information_gain, layer.bits)
            for name, layer in report.layers.items()
        }
        return cls(task, report.used_capacity, report.predicted_forgetting, report.information_gain, layers)

    def share_of_bits(self, layers: Iterable[str]) -> float:
        """Return the frozen bits of some layers, as a share of all bits of the network.

        Args:
            layers: The names of the layers; a layer that only a later task brought has no frozen bits.

        Returns:
            The share, 0 to 1.

        Example:
            >>> layers = {"0": LayerBits(3, 0.5, 1.0, [0, 3, 0]), "1": LayerBits(1, 1.0, 1.0, [0, 0, 1])}
            >>> BoundaryRecord("first", 0.625, 0.0, 2.0, layers).share_of_bits(["0"])
            0.375
        """
        values = sum(layer.values for layer in self.layers.values())
        known = [self.layers[name] for name in layers if name in self.layers]
        return sum(layer.used_capacity * layer.values for layer in known) / values

    def grouped(self, most: int) -> dict[str, list[str]]:
        """Return the layers in groups: each of those with the most frozen bits alone, all others together.

        Args:
            most: The number of layers that are alone.

        Returns:
            The names of the layers in each group, by the name of the group. The layers that are alone come
            first, in the network's order.
        """
        names = list(self.layers)
        largest = sorted(names, key=lambda name: -self.share_of_bits([name]))[:most]
        others = [name for name in names if name not in largest]
        alone = {name: [name] for name in names if name in largest}
        return {**alone, f"{len(others)} others": others} if others else alone

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> BoundaryRecord:
        """Return the object from which ``dataclasses.asdict`` made a dict."""
        layers = {name: LayerBits(**layer) for name, layer in plain["layers"].items()}
        return cls(**{**plain, "layers": layers})


@dataclass(frozen=True)
class Predicted:
    """The forgetting that BLIP predicted at one moment of the training.

    Attributes:
        position: The position in the sequence, as in :class:`Score`.
        forgetting: The predicted rise of the past tasks' loss, in nats per sample.
    """

    position: float
    forgetting: float


@dataclass(frozen=True)
class RunRecord:
    """All that was measured while a sequence was learned, in plain values, which a JSON file holds.

    Attributes:
        metric: The name of the metric; higher is better. It says so if scores were divided by ceilings.
        tasks: The names of all tasks of the sequence.
        matrix: R, T rows of T: the score on task j after learning task i, NaN where not measured.
        scores: One per validation and task seen by then.
        frozen: One per boundary at which BLIP froze bits.
        predicted: The forgetting that BLIP predicted while the tasks were trained.
        settings: ``"blip"`` and ``"chosen"`` (None without BLIP), ``"stream"``, ``"ceilings"`` by task (None
            if scores are as they were logged), ``"hyperparameters"`` of the module, and ``"versions"``.

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
    frozen: list[BoundaryRecord]
    predicted: list[Predicted]
    settings: dict[str, Any]

    @property
    def scores_by_task(self) -> dict[str, list[Score]]:
        """The scores on each task that was scored, in the order in which the tasks were learned."""
        by_task: dict[str, list[Score]] = {}
        for score in self.scores:
            by_task.setdefault(score.task, []).append(score)
        return by_task

    @property
    def seen(self) -> list[str]:
        """The names of the tasks that were scored, in the order in which they were learned."""
        return list(self.scores_by_task)

    @property
    def all_scores(self) -> list[float]:
        """The values of all scores: those of the validations, and those of R."""
        return [score.score for score in self.scores] + [score for row in self.matrix for score in row]

    def write(self, path: str | Path) -> None:
        """Write the record as JSON, so that a reader sees either all of it or the file as it was before.

        Args:
            path: The JSON file. Numbers that are not finite become null.
        """
        write_json(path, plain({"version": VERSION, **asdict(self)}))

    @classmethod
    def read(cls, path: str | Path) -> RunRecord:
        """Return the record that :meth:`write` wrote.

        Args:
            path: The JSON file.

        Returns:
            The record; NaN stands where the file has null for a number.

        Raises:
            ValueError: If the file is not a record, or a record of a later version.
        """
        path = Path(path)
        try:
            saved = dict(json.loads(path.read_text(encoding="utf-8")))
            version = saved.pop("version")
            if version > VERSION:
                raise ValueError(
                    f"it has version {version}, and this lightning-blip reads version {VERSION}: update "
                    "lightning-blip"
                )
            settings = saved.pop("settings")
            saved = _with_nan(saved)
            return cls(
                saved["metric"],
                saved["tasks"],
                saved["matrix"],
                [Score(**score) for score in saved["scores"]],
                [BoundaryRecord.from_plain(frozen) for frozen in saved["frozen"]],
                [Predicted(**predicted) for predicted in saved["predicted"]],
                settings,
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"path={str(path)!r} is not a readable record of a run: {error}") from error


def write_json(path: str | Path, value: Any) -> None:
    r"""Write a value as JSON, so that a reader sees either all of it or the file as it was before.

    Args:
        path: The file.
        value: What ``json`` can write; anything else within it is written as its ``str``.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     write_json(Path(folder) / "sizes.json", {"sizes": [1, 2]})
        ...     (Path(folder) / "sizes.json").read_text()
        '{"sizes": [1, 2]}\n'
    """
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.tmp")
    text = json.dumps(value, default=str, ensure_ascii=False)
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.replace(path)


def plain(value: Any) -> Any:
    """Return any value in the types of JSON: None for a number that is not finite, else a name or the repr.

    Args:
        value: Any value, such as hyperparameters.

    Returns:
        The same, made of dicts, lists, strings, numbers, True, False and None.

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
    """Return a value with NaN for None: outside its settings, a record has None only for such numbers."""
    if isinstance(value, dict):
        return {name: _with_nan(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_with_nan(part) for part in value]
    return math.nan if value is None else value
