"""Streams of games: their environments, and scores as shares of those of single-task runs."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import learning, run
from benchmarks.games import GAMES
from benchmarks.methods import METHODS
from benchmarks.plan import PARTS, Entry, Part
from benchmarks.record import Record
from benchmarks.results import section, verdict
from benchmarks.rows import Row
from tests.helpers.interruption import interrupt_and_go_on


def quiet(*_):
    pass


def short(name, tasks):
    sizes = {
        "num_envs": 2, "rollout_steps": 16, "updates_per_epoch": 2, "passes": 2, "batch_size": 16,
        "episodes": 20,
    }  # fmt: skip
    return replace(GAMES[name], tasks=tasks, epochs=2, validate_every=1, options=sizes)


@pytest.fixture
def games(monkeypatch):
    """Register two games of two epochs each, whose best return is unknown, and return them."""
    games = replace(short("cartpole", 2), best=None)
    monkeypatch.setitem(learning.STREAMS, "cartpole", games)
    return games


def test_all_games_of_minatar_have_ten_channels_and_fit_the_agent():
    games = GAMES["minatar"]
    stream, module = games.stream(None, seed=0), games.module()
    assert [task.action_space.n for task in stream.tasks] == list(games.actions)
    for task in stream.tasks:
        environment = task.environment()
        cells, _ = environment.reset(seed=0)
        assert cells.shape == (10, 10, 10)
        assert environment.observation_space.contains(cells)
        assert set(np.unique(cells)) == {0, 1}
        assert module(torch.as_tensor(cells)[None]).shape == (1, 3)
        assert environment.spec.max_episode_steps == 2_500


def test_the_single_task_run_of_a_seed_is_its_ceiling(games, tmp_path):
    record = learning.Run(games, "finetune", {}).record(tmp_path, tmp_path, seed=1, report=quiet)
    single = Record.read(tmp_path / "cartpole-single-seed1.json")
    assert single.ceilings == record.ceilings
    assert single.R == [[None, None], [100.0, 100.0]]
    assert min(single.ceilings) > 0
    learned = learning.Run(games, "finetune", {}).learn(tmp_path, seed=1, report=quiet)
    returns = np.array(learned.R, dtype=float)[-1] / 100
    assert record.R[-1] == pytest.approx((100 * returns / np.array(single.ceilings)).tolist(), rel=1e-4)


def test_a_single_task_run_learns_each_game_as_a_stream_of_one_game(games, tmp_path):
    single = learning.Run(games, "single", {}).learn(tmp_path, seed=0, report=quiet)
    for game, ceiling in zip(games.alone(), single.ceilings, strict=True):
        assert len(game.environments) == game.tasks == 1
        record = learning.Run(game, "finetune", {}).learn(tmp_path, seed=0, report=quiet)
        assert pytest.approx(100 * ceiling, rel=1e-3) == record.ACC


def test_a_known_best_return_is_the_ceiling_of_single_task_runs(tmp_path):
    games = short("cartpole", 2)
    record = learning.Run(games, "single", {}).learn(tmp_path, seed=0, report=quiet)
    assert record.ceilings == [500.0, 500.0]
    assert record.R[-1] == [
        learning.Run(game, "finetune", {}).learn(tmp_path, seed=0, report=quiet).ACC for game in games.alone()
    ]
    assert pytest.approx(sum(record.R[-1]) / 2) == record.ACC


def test_the_ceiling_of_fewer_games_is_the_single_task_run_of_all_games(games, tmp_path):
    fewer = replace(games, tasks=1)
    record = learning.Run(fewer, "finetune", {}).record(tmp_path, tmp_path, seed=0, report=quiet)
    assert record.ceilings == Record.read(tmp_path / "cartpole-single-seed0.json").ceilings[:1]


def test_a_record_has_the_curve_of_each_game(games, tmp_path):
    record = learning.Run(games, "blip", {}).learn(tmp_path, seed=0, report=quiet, ceilings=[2.0, 4.0])
    first, second = record.curves["heavy"], record.curves["reversed"]
    assert [position for position, _ in first] == [0.5, 1.0, 1.0, 1.5, 2.0, 2.0]
    assert [position for position, _ in second] == [1.5, 2.0, 2.0]
    assert first[-1][1] == pytest.approx(record.R[1][0], abs=0.01)
    record.write(tmp_path / "record.json")
    assert Record.read(tmp_path / "record.json").curves["heavy"][0][0] == 0.5


def test_a_run_interrupted_within_a_game_goes_on_after_the_last_epoch(tmp_path):
    stream = learning.Run(short("cartpole", 2), "blip", {})
    record, _, _, again = interrupt_and_go_on(stream, tmp_path, tmp_path, "task 2 of 2, epoch 2")
    assert [where.split(": ")[1].split(", ")[:2] for where, _ in again] == [["task 2 of 2", "epoch 2 of 2"]]
    unbroken = stream.learn(tmp_path, 0, report=quiet)
    assert replace(record, seconds=0.0) == replace(unbroken, seconds=0.0)


def test_methods_that_need_returns_are_refused_for_data_sets(capsys):
    with pytest.raises(SystemExit):
        run.main(["split_mnist", "--method", "single"])
    assert "single needs returns, which split_mnist does not have" in capsys.readouterr().err


def test_a_part_can_set_the_values_of_a_search():
    (ewc,) = [entry for entry in PARTS["games"][0].entries if entry.method == "ewc"]
    assert [job.run.settings["strength"] for job in ewc.search] == [5_000, 50, 5, 0.5]
    usual = Entry(Part("cartpole"), "ewc").search
    assert [job.run.settings["strength"] for job in usual] == list(METHODS["ewc"].values)


def test_the_results_have_single_task_returns_and_a_curve_per_game(tmp_path):
    part = Part("cartpole", seeds=2, methods=("single", "finetune", "blip"))
    for entry in part.entries:
        for job in entry.seeds_of_best(tmp_path):
            R = [[None] * 3, [None] * 3, [50.0, 60.0, 70.0]]
            curves = {name: [(0.5, 10.0 + job.seed), (1.0, 90.0)] for name in ("heavy", "reversed", "light")}
            record = replace(
                RECORD, stream="cartpole", method=entry.method, seed=job.seed, tasks=3, R=R, ACC=60.0,
                ceilings=[500.0 + 100 * job.seed] * 3, curves=curves,
            )  # fmt: skip
            record.write(job.path(tmp_path))
    text = section(part, tmp_path, tmp_path, "pictures")
    expected = (
        "Returns of the single-task runs: heavy 275.00 ± 35.36, reversed 330.00 ± 42.43, light 385.00 ±"
    )
    assert expected in text
    assert "![return of each game over the training](pictures/cartpole-curves.png)" in text
    assert (tmp_path / "cartpole-curves.png").stat().st_size > 10_000
    row = Row(
        "blip", [Record.read(job.path(tmp_path)) for job in Entry(part, "blip").seeds_of_best(tmp_path)]
    )
    assert row.curves["heavy"].tolist() == [[0.5, 1.0], [10.5, 90.0]]


def test_single_task_runs_do_not_count_as_a_method():
    def row(method, acc):
        return Row(method, [replace(RECORD, method=method, ACC=acc)])

    text = verdict([row("single", 100.0), row("finetune", 50.0), row("blip", 90.0)], "")
    assert text == "BLIP is ahead of all others, by 40.00 points of the next, fine-tuning."


@pytest.mark.nightly
@pytest.mark.parametrize("method", ["finetune", "blip"])
def test_blip_keeps_the_environments_that_fine_tuning_forgets(method, tmp_path):
    record = learning.Run(GAMES["cartpole"], method, {}).learn(tmp_path, seed=0, report=quiet)
    learned = [record.R[0][0], record.R[1][1]]
    kept = [100 * now / then for now, then in zip(record.R[2][:2], learned, strict=True)]
    assert min(learned) > 95
    assert min(kept) >= 90 if method == "blip" else max(kept) < 60


RECORD = Record(
    stream="minatar", method="blip", settings={}, seed=0, tasks=1, epochs=1, ACC=0.0, BWT=None, FWT=None,
    R=[[0.0]], used_capacity=[], bytes_per_parameter=0.0, seconds=0.0, machine="", torch_version="",
)  # fmt: skip
