"""Atari's games are learned and timed; agents are saved after each task and filmed."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from benchmarks import atari, learning, run
from benchmarks.agents import read_agents
from benchmarks.film import play
from benchmarks.games import GAMES
from benchmarks.record import Record
from benchmarks.trainer import quiet_trainer
from lightning_blip import BLIP, ForgettingCurves
from lightning_blip.tasks.rollouts import Episodes
from tests.helpers.fitting import same
from tests.helpers.stay_frozen import StayFrozen

SIZES = {
    "num_envs": 2, "rollout_steps": 16, "updates_per_epoch": 2, "passes": 2, "batch_size": 16, "episodes": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Return the folder of a run on the first two tasks of cartpole."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            learning.STREAMS, "cartpole", replace(GAMES["cartpole"], tasks=2, epochs=1, options=SIZES)
        )
        run.main(["cartpole", "--method", "blip", "--seeds", "1", "--out", str(folder)])
    return folder


def test_saved_agents_have_the_scores_of_the_record(kept):
    stream, agents = read_agents(kept)
    assert [task.name for task in stream] == ["heavy", "reversed"]
    R = Record.read(kept / "cartpole-blip-seed0.json").R
    for after, agent in enumerate(agents):
        for task, loader in enumerate(stream.test_dataloader()[: after + 1]):
            (evaluation,) = loader
            agent.head.active = task
            returns = Episodes(evaluation.environment, SIZES["episodes"], evaluation.seed).play(agent)
            assert 100 * returns.mean() / 500 == pytest.approx(R[after][task], abs=1e-3)
    assert len(agents) == 2
    assert not same(agents[0].body.state_dict(), agents[1].body.state_dict())


def test_a_folder_with_agents_of_several_runs_needs_the_name_of_one(kept, tmp_path):
    for name in ("a=0.5-seed0-after0.pt", "a=0.5-seed1-after0.pt"):
        (tmp_path / name).write_bytes((kept / "cartpole-blip-seed0-after0.pt").read_bytes())
    with pytest.raises(ValueError, match=r"run=None must be one of \['a=0.5-seed0', 'a=0.5-seed1'\]"):
        read_agents(tmp_path)
    assert len(read_agents(tmp_path, "a=0.5-seed1")[1]) == 1


def test_a_scene_is_the_start_of_the_scored_episode(kept):
    stream, agents = read_agents(kept)
    whole, begun = play(agents[0], stream, 0, 500), play(agents[0], stream, 0, 3)
    assert whole.paid == begun.paid == len(whole.screens)
    assert len(begun.screens) == 3
    assert all((one == other).all() for one, other in zip(whole.screens[:3], begun.screens, strict=True))
    assert not (whole.screens[0] == whole.screens[-1]).all()


def test_a_scene_of_minatar_has_coloured_cells():
    games = replace(GAMES["minatar"], tasks=1)
    scene = play(games.module(), games.stream(None, seed=0), 0, 4)
    assert [screen.shape for screen in scene.screens] == [(10, 10, 3)] * 4


def test_a_scene_of_atari_is_what_the_agent_saw_in_colour():
    class Seeing:
        device = torch.device("cpu")
        seen = []

        def modules(self):
            return []

        def act(self, observations, explore):
            self.seen.append(observations[0, -1].numpy())
            return {"actions": torch.tensor([len(self.seen) // 7 % 6])}

    games = atari.short(["SpaceInvaders"], 16)
    scene = play(Seeing(), games.stream(None, seed=0), 0, 150)
    assert len(scene.screens) == 150
    for screen, seen in zip(scene.screens, Seeing.seen, strict=False):
        assert screen.shape == (210, 160, 3)
        grey = Image.fromarray(screen).convert("L").resize((84, 84), Image.Resampling.HAMMING)
        # Screens of the next step would differ by 75.
        assert np.abs(np.asarray(grey, dtype=int) - seen).max() < 40


def cell(frame, row, column):
    """Return the middle of one of 2x2 cells, without the titles."""
    height, width = frame.shape[0] // 2, frame.shape[1] // 2
    return frame[
        row * height + height // 6 : (row + 1) * height,
        column * width + width // 6 : (column + 1) * width - width // 10,
    ]


def test_a_film_has_each_game_after_each_task_from_its_own_on(kept, tmp_path):
    out = tmp_path / "grid.gif"
    atari.main(["render", str(kept), "--out", str(out), "--seconds", "0.8", "--fps", "10"])
    with Image.open(out) as film:
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(film)]
        assert film.info["duration"] == 100
    assert [frame.shape for frame in frames] == [(440, 400, 3)] * 8
    for frame in frames:
        assert cell(frame, 0, 1).min() > 250
        assert min(cell(frame, *place).min() for place in ((0, 0), (1, 0), (1, 1))) < 50
    for place in ((0, 0), (1, 0), (1, 1)):
        assert (cell(frames[0], *place) != cell(frames[-1], *place)).any()


def test_a_film_that_cannot_be_made_is_refused(kept, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(atari.FFMpegWriter, "isAvailable", lambda: False)
    for folder, out, said in (
        (tmp_path, "a.gif", "run=None must be one of []"),
        (kept, "a.png", "a.png must end in .gif or .mp4"),
        (kept, "a.mp4", "a.mp4 needs ffmpeg: apt-get install ffmpeg, or give a .gif"),
    ):
        with pytest.raises(SystemExit):
            atari.main(["render", str(folder), "--out", out])
        assert said in capsys.readouterr().err


def test_each_speed_is_printed_in_a_line(capsys):
    atari.main(["speed", "--games", "Boxing", "--steps", "40"])
    lines = capsys.readouterr().out.splitlines()
    number = "[0-9,]+"
    end = (
        rf": {number} environment steps per second \(Boxing {number}\); .+ threads of torch, {number} of the"
    )
    for line, begin in zip(lines, ("emulators alone, random", "rollouts", "whole training"), strict=True):
        assert re.match(f"{begin}.*{end}", line)
    with pytest.raises(SystemExit):
        atari.main(["speed", "--steps", "15"])
    assert "--steps 15 must be at least 16" in capsys.readouterr().err


def test_bits_frozen_by_one_game_of_atari_stay_frozen_in_the_next():
    torch.manual_seed(0)
    games = atari.short(["Riverraid", "SpaceInvaders"], 512)
    games = replace(games, options={**games.options, "episodes": 2})
    blip, curves = BLIP(), ForgettingCurves("val_return")
    frozen = StayFrozen(blip)
    trainer = quiet_trainer([blip, frozen, curves], num_sanity_val_steps=0, check_val_every_n_epoch=9)
    trainer.fit(games.module(), datamodule=games.stream(None, seed=0))
    assert blip.tasks_learned == 2
    assert curves.matrix.tril().isfinite().all()
    assert sum(int((bits > 0).sum()) for bits in blip.bits().values()) > 1_000
    assert frozen.before
