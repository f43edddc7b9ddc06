"""The table of results: it follows from the records alone, and the suite makes them."""

import re
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import results, suite
from benchmarks.learning import Run
from benchmarks.machine import machine
from benchmarks.plan import Entry, Job, Part
from benchmarks.published import checks
from benchmarks.record import Record
from benchmarks.rows import row_of

PART = Part("split_fashion", seeds=2, epochs=1, methods=("finetune", "ewc", "blip", "joint"))


def write(folder, job, acc, bwt=-10.0):
    """Write the record of a run with this score."""
    protocol = job.run.protocol
    R = np.tri(protocol.tasks) * acc
    record = Record(
        stream=protocol.name, method=job.run.method, settings=job.run.settings, seed=job.seed,
        tasks=protocol.tasks, epochs=protocol.epochs, ACC=acc, BWT=bwt, FWT=None,
        R=np.where(R > 0, R, None).tolist(), used_capacity=[], bytes_per_parameter=8.0, seconds=300.0,
        machine=machine(), torch_version="2",
    )  # fmt: skip
    record.write(job.path(folder))


@pytest.fixture
def records(tmp_path):
    """Write all records of a part, in which λ = 30 is the best of the search for EWC."""
    folder = tmp_path / "records"
    scores = {"finetune": 70.0, "ewc": 80.0, "blip": 90.0, "joint": 99.0}
    for entry in PART.entries:
        for job, acc in zip(entry.search, (60.0, 61.0, 75.0, 62.0), strict=False):
            write(folder, job, acc)
        for job in entry.seeds_of_best(folder):
            write(folder, job, scores[entry.method] + job.seed)
    return folder


def test_the_search_runs_before_the_seeds(tmp_path):
    entry = Entry(PART, "ewc")
    first = entry.left(tmp_path)
    assert [job.run.settings for job in first] == [{"strength": value} for value in (3, 10, 30, 100)]
    assert {(job.seed, job.run.protocol.tasks) for job in first} == {(0, 3)}
    assert sum(job.epochs for job in entry.to_come(tmp_path)) == 4 * 3 + 2 * 5
    for job, acc in zip(first, (60.0, 75.0, 61.0, 62.0), strict=True):
        write(tmp_path, job, acc)
    best = Run(PART.protocol, "ewc", {"strength": 10})
    assert entry.left(tmp_path) == [Job(best, 0), Job(best, 1)]
    assert entry.to_come(tmp_path) == entry.left(tmp_path)
    for job in entry.left(tmp_path):
        write(tmp_path, job, 70.0)
    assert entry.left(tmp_path) == []


def test_the_next_best_value_is_taken_if_the_whole_stream_diverges_with_the_best(records, tmp_path):
    entry = Entry(PART, "ewc")
    best = entry.seeds_of_best(records)
    assert best[0].run.settings == {"strength": 30}
    best[1].diverged(records).write_text("not finite")
    assert [job.run.settings for job in entry.left(records)] == [{"strength": 100}] * 2
    assert row_of(entry, records) is None
    text = results.section(PART, records, tmp_path, "pictures")
    assert "30: 75.00, which diverged over the whole stream, 100: 62.00" in text
    for job in entry.search:
        job.diverged(records).write_text("not finite")
    assert "100: diverged." in results.section(PART, records, tmp_path, "pictures")


def test_a_setting_can_be_searched_on_another_stream(tmp_path):
    entry = Entry(Part("three_sets", seeds=1, epochs=1, searched_on=PART), "ewc")
    assert entry.left(tmp_path) == Entry(PART, "ewc").left(tmp_path)
    for job, acc in zip(entry.left(tmp_path), (60.0, 61.0, 75.0, 62.0), strict=True):
        write(tmp_path, job, acc)
    (found,) = entry.left(tmp_path)
    assert (found.run.protocol.name, found.run.settings) == ("three_sets", {"strength": 30})


def test_the_table_has_the_figures_of_the_records(records, tmp_path):
    text = results.section(PART, records, tmp_path, "pictures")
    rows = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith("| ")}
    assert "| 2 | 80.50 ± 0.71 | −10.00 ± 0.00 | – | 8.0 | 300 |" in rows["| online EWC, strength = 30"]
    assert "90.50 ± 0.71" in rows["| BLIP"]
    assert "ahead of all others, by 10.00 ± 0.00 points of the next, online EWC, strength = 30." in text
    assert "online EWC, strength = 3: 60.00, 10: 61.00, 30: 75.00, 100: 62.00" in text
    assert (tmp_path / "split_fashion-1-epochs.png").stat().st_size > 10_000


def test_the_table_says_if_another_method_is_ahead(records):
    rows = [row_of(entry, records) for entry in PART.entries]
    rows[0] = replace(rows[0], records=[replace(rows[0].records[0], ACC=95.0)])
    assert results.verdict(rows, "Nothing is forgotten.") == (
        "fine-tuning is ahead of BLIP by 5.00 points. Nothing is forgotten."
    )


def test_a_lead_is_computed_seed_by_seed(records):
    _, ewc, blip, _ = (row_of(entry, records) for entry in PART.entries)
    first, second = blip.records
    said = results.verdict([ewc, replace(blip, records=[first, replace(second, ACC=first.ACC)])], "")
    assert "BLIP is ahead of all others, by 9.50 ± 0.71 points of the next, " in said
    assert results.verdict([replace(ewc, records=ewc.records[:1]), replace(blip, records=[second])], "") == ""


def test_a_table_names_its_command_machine_and_duration(records, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "PARTS", {"long": (PART,)})
    text = results.table("long", records, tmp_path, "pictures")
    made = f"12 runs, one after the other 1.0 hours, on: {machine()}."
    assert f"`make benchmarks DATA=DIR TABLE=long`: {made}" in text


def test_a_part_without_records_is_left_out(tmp_path):
    assert results.section(PART, tmp_path, tmp_path, "pictures") == ""
    assert results.table("cpu", tmp_path, tmp_path, "pictures") == ""


@pytest.mark.parametrize(("score", "verdict"), [(96.5, "yes"), (90.0, "**no**")])
def test_a_baseline_is_compared_with_its_published_figure(score, verdict, tmp_path):
    entry = Entry(Part("permuted_mnist"), "joint")
    for job in entry.left(tmp_path):
        write(tmp_path, job, score, bwt=None)
    line = checks(tmp_path).splitlines()[2]
    assert line.startswith(f"| joint training | `permuted_mnist` | 96.70 | {score:.2f} | {score - 96.7:+.2f}")
    assert f"(within 1: {verdict})" in line


@pytest.fixture
def part(tmp_path, monkeypatch):
    """Replace the plan by one short part, in a new folder."""
    part = Part("split_fashion", seeds=1, epochs=1, methods=("finetune", "joint"))
    for module in (suite, results):
        monkeypatch.setattr(module, "PARTS", {"cpu": (part,)})
    (tmp_path / "benchmarks").mkdir()
    return part


def test_the_suite_runs_what_has_no_record_and_writes_the_table(part, data, tmp_path, capsys):
    first, second = (entry.seeds_of_best(tmp_path)[0] for entry in part.entries)
    out = tmp_path / "records"
    write(out, second, 88.0, bwt=None)
    suite.main(["--data", str(data), "--out", str(out), "--processes", "1"])
    said = capsys.readouterr().out
    where = re.findall(r"\[(.*) left\] split_fashion finetune .*: task (\d) of 5, epoch 1 of 1", said)
    assert [task for _, task in where] == ["1", "2", "3", "4", "5"]
    # Estimated from the other run's 300 s for five epochs.
    assert [left for left, _ in where] == [f"0 h 0{minutes} min" for minutes in (4, 3, 2, 1, 0)]
    assert first.path(out).exists()
    assert Record.read(second.path(out)).ACC == 88.0
    table = (out / "RESULTS.md").read_text()
    assert "| joint training | 1 | 88.00 | – |" in table
    assert "![split_fashion](pictures/split_fashion-1-epochs.png)" in table
    assert (out / "pictures" / "split_fashion-1-epochs.png").exists()
    assert said.startswith("Runs to come: 1.")
    assert f"Written: {out / 'RESULTS.md'}" in said


def test_with_all_records_the_suite_says_how_to_repeat_them(part, tmp_path, capsys):
    records = tmp_path / "benchmarks" / "records"
    for entry in part.entries:
        write(records, entry.seeds_of_best(records)[0], 88.0)
    suite.main([])
    said = capsys.readouterr().out
    assert said.startswith(
        "Runs to come: 0. Runs with a record in benchmarks/records are done; another --out repeats all"
    )
    table = (tmp_path / "benchmarks" / "RESULTS.md").read_text()
    assert "![split_fashion](../docs/results/split_fashion-1-epochs.png)" in table


def test_in_a_new_folder_the_time_left_is_estimated_from_the_records_of_the_repository(part, tmp_path):
    write(tmp_path / "benchmarks" / "records", part.entries[0].seeds_of_best(tmp_path)[0], 88.0)
    # Two runs of five epochs, at 300 s for five.
    assert suite.Suite(part.entries, tmp_path, tmp_path / "new", "cpu", 1).time_left() == "0 h 10 min"


@pytest.mark.usefixtures("part")
def test_a_failed_run_is_named_and_the_others_continue(tmp_path, capsys):
    with pytest.raises(SystemExit):
        suite.main(["--data", str(tmp_path), "--out", "records", "--processes", "2"])
    said = capsys.readouterr().out
    assert "failed: split_fashion-finetune-epochs=1-seed0: FileNotFoundError" in said
    assert "failed: split_fashion-joint-epochs=1-seed0: FileNotFoundError" in said
