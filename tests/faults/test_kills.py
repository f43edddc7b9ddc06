"""A fit that is killed at any moment and resumed ends bit for bit like the unbroken fit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def carried_out(*arguments):
    # The script forks, which the process of the tests must not do, because it has threads.
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
    assert not bad, "\n".join([f"{len(bad)} of {number} kills changed the results:", *bad])


def test_a_few_kills_of_different_kinds_change_nothing():
    # With this seed the kills are in four setups, and the fits resume from different checkpoints: within a
    # task, in its first epoch, at a boundary, and at the validation before a boundary.
    kills = carried_out("--kills=4", "--seed=10")
    assert len({kill["kind"] for kill in kills}) == 4
    check(kills, 4)


@pytest.mark.nightly
def test_unbroken_fits_are_equal():
    check(carried_out("--kills=0", "--control"), 4)


@pytest.mark.nightly
@pytest.mark.parametrize("options", [[], ["--twice"]])
def test_no_kill_changes_anything(options):
    check(carried_out("--kills=40", *options), 40)
