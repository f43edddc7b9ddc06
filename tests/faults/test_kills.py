"""A fit that is killed anywhere, and resumed, ends bit for bit as the one that was not killed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def carried_out(*arguments):
    # In a process of its own: it forks, which a process with a test run's threads must not do.
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.run", "--json", *arguments],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(kills, number):
    assert len(kills) == number
    bad = [kill["row"] for kill in kills if not kill["good"]]
    assert not bad, "\n".join([f"{len(bad)} of {number} kills left something else behind:", *bad])


def test_a_few_kills_of_different_kinds_change_nothing():
    # With this seed in four setups, and at places whose checkpoints differ in what is hard about them: within
    # a task, in its first epoch's, at a boundary, and at the validation before one.
    kills = carried_out("--kills=4", "--seed=10")
    assert len({kill["kind"] for kill in kills}) == 4
    check(kills, 4)


@pytest.mark.nightly
def test_fits_that_are_not_killed_are_alike():
    check(carried_out("--kills=0", "--control"), 4)


@pytest.mark.nightly
@pytest.mark.parametrize("options", [[], ["--twice"]])
def test_no_kill_changes_anything(options):
    check(carried_out("--kills=40", *options), 40)
