"""RunRecord: it is read as it was written, and other files are refused."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_blip.results.record import BoundaryRecord, LayerBits, Predicted, RunRecord, Score, plain

RECORD = RunRecord(
    metric="val_acc",
    tasks=["Käse", "2-3"],
    matrix=[[0.91, 0.25], [0.88, 0.93]],
    scores=[Score(938, 0, 0.5, "Käse", "Käse", 0.9, False), Score(1876, 1, 1.0, "Käse", "Käse", 0.91, True)],
    frozen=[BoundaryRecord("Käse", 0.01, 0.0, 345.5, {"body.0": LayerBits(3, 1 / 30, 345.5, [1, 2, 0])})],
    predicted=[Predicted(1.25, 0.1 + 0.2)],
    settings={"blip": None, "chosen": None, "hyperparameters": {"rate": 0.1, "layers": None}},
)


def test_a_record_is_read_as_it_was_written(tmp_path):
    RECORD.write(tmp_path / "forgetting.json")
    assert RunRecord.read(tmp_path / "forgetting.json") == RECORD
    assert [path.name for path in tmp_path.iterdir()] == ["forgetting.json"]
    saved = json.loads((tmp_path / "forgetting.json").read_text(encoding="utf-8"))
    assert saved["version"] == 1
    assert saved["scores"][0] == {
        "step": 938, "epoch": 0, "position": 0.5, "learning": "Käse", "task": "Käse", "score": 0.9,
        "boundary": False,
    }  # fmt: skip
    assert saved["frozen"][0]["layers"]["body.0"]["bits"] == [1, 2, 0]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_null_in_the_file_and_nan_when_read(tmp_path, number):
    record = replace(RECORD, matrix=[[0.5, number], [0.1, 0.2]], predicted=[Predicted(1.5, number)])
    record.write(tmp_path / "forgetting.json")
    saved = json.loads((tmp_path / "forgetting.json").read_text(encoding="utf-8"))
    assert saved["matrix"] == [[0.5, None], [0.1, 0.2]]
    read = RunRecord.read(tmp_path / "forgetting.json")
    assert math.isnan(read.matrix[0][1])
    assert math.isnan(read.predicted[0].forgetting)
    assert read.settings == RECORD.settings  # in settings, None stays None


def test_an_interrupted_write_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "forgetting.json"
    RECORD.write(path)
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        replace(RECORD, metric="other").write(path)
    assert RunRecord.read(path) == RECORD


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ('{"version": 1, "metric": "val', "Unterminated string"),
        ("[]", "'version'"),
        ('{"metric": "val_acc"}', "'version'"),
        ('{"version": 1, "settings": {}}', "'metric'"),
        (
            '{"version": 2, "settings": {}}',
            "version 2, and this lightning-blip reads version 1: update lightning-blip",
        ),
    ],
)
def test_a_file_that_is_not_a_record_is_refused(tmp_path, text, message):
    (tmp_path / "other.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"other\.json' is not a readable record of a run: .*" + message):
        RunRecord.read(tmp_path / "other.json")


def test_the_layers_with_the_fewest_frozen_bits_are_grouped_together():
    first = BoundaryRecord("a", 0.1, 0.0, 1.0, {"0": LayerBits(10, 0.1, 1.0, [8, 2])})
    layers = {
        "0": LayerBits(10, 0.2, 1.0, [6, 4]),
        "1": LayerBits(10, 0.0, 0.0, [10, 0]),
        "2": LayerBits(20, 0.5, 2.0, [10, 10]),
    }
    last = BoundaryRecord("b", 0.3, 0.0, 3.0, layers)
    assert last.grouped(1) == {"2": ["2"], "2 others": ["0", "1"]}
    assert last.grouped(2) == {"0": ["0"], "2": ["2"], "1 others": ["1"]}
    assert last.grouped(3) == {"0": ["0"], "1": ["1"], "2": ["2"]}
    assert last.share_of_bits(["0", "1"]) == pytest.approx(2 / 40)
    assert first.share_of_bits(["0"]) == pytest.approx(0.1)
    assert first.share_of_bits(["2"]) == 0.0  # a layer that only a later task brought


def test_values_of_any_type_become_plain_values():
    values = {1: (True, 2), "path": Path("a"), "type": torch.nn.ReLU, "none": None, "text": "b"}
    assert plain(values) == {
        "1": [True, 2], "path": repr(Path("a")), "type": "ReLU", "none": None, "text": "b"
    }  # fmt: skip
