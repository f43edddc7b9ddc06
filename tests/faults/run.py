"""Kill fits at counted moments, resume them, and compare the results with those of the unbroken fit.

``python -m tests.faults.run --kills 40`` prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.faults.fit import KINDS, TASKS, Setup, fit

SETUPS = (
    Setup("diagonal", saves="epoch", heads=False, prior=1e-4),
    Setup("kronecker", saves="validation", heads=False, prior="auto", plateau=True),
    Setup("kronecker", saves="epoch", heads=True, prior=1e-4, plateau=True),
    Setup("diagonal", saves="validation", heads=True, prior=1e-4),
    Setup("diagonal", saves="batch", heads=False, prior="auto", plateau=True),
    Setup("kronecker", saves="batch", heads=True, prior=1e-4),
)
# The number of moments in about two epochs and the boundary between them.
SOON = 60


@dataclass
class Kill:
    """A kill and its outcome.

    Attributes:
        number: Its number in the plan.
        setup: The index of its setup in ``SETUPS``.
        kind: The kind of the moment.
        moment: The number of moments before it; None for no kill.
        where: The current step, or the last one.
        again: The moment at which the resumed fit is killed, too, counted from the resumption.
        killed: The boundaries crossed before the last kill.
        resumed: The boundaries crossed after it. One may be crossed twice, if no checkpoint had it yet.
        crossed: The boundaries that the final state contains; each should occur once.
        differs: The results that are not bit for bit those of the unbroken fit.
        first: The first step or boundary at which the resumed fit differs from the unbroken one.
        error: Why the fit could not be killed or resumed.
    """

    number: int
    setup: int
    kind: str
    moment: int | None
    where: str
    again: int | None = None
    killed: list[int] = field(default_factory=list)
    resumed: list[int] = field(default_factory=list)
    crossed: list[int] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)
    first: str = ""
    error: str = ""

    @property
    def good(self) -> bool:
        """Whether the resumed fit equals the unbroken one."""
        return not self.differs and not self.error and self.crossed == list(range(TASKS))


def main() -> None:
    """Kill, resume, compare, and print the outcomes."""
    given = _arguments()
    torch.set_num_threads(1)
    setups = [replace(setup, noise=not given.steady, across=given.across_devices) for setup in SETUPS]
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.folder or Path(temporary) / "runs").resolve()
        folder.mkdir()  # fails if it exists: a fit would resume from an old checkpoint in it
        wholes = [folder / f"setup-{index}" for index in range(len(setups))]
        moments = [unbroken(*pair)["moments"] for pair in zip(setups, wholes, strict=True)]
        kills = plan(moments, given.kills, given.seed, given.twice)
        if given.control:
            kills += [Kill(len(kills) + i, i, "(not killed)", None, "") for i in range(len(setups))]
        if given.only is not None:
            kills = [kill for kill in kills if kill.number in given.only]
        for kill in kills:
            carry_out(kill, setups[kill.setup], wholes[kill.setup], folder / f"kill-{kill.number}")
            if not given.folder:
                shutil.rmtree(folder / f"kill-{kill.number}")
            if not given.json:
                sys.stdout.write(f"{row(kill)}\n")
                sys.stdout.flush()
    good = sum(kill.good for kill in kills)
    if given.json:
        json.dump([{"row": row(kill), "good": kill.good, **asdict(kill)} for kill in kills], sys.stdout)
    else:
        sys.stdout.write(f"{good} of {len(kills)} ended like the unbroken fit\n")


def unbroken(setup: Setup, folder: Path) -> dict[str, Any]:
    """Run a fit without a kill, and return its results."""
    if code := forked(folder, partial(fit, setup, folder, None)):
        raise RuntimeError(f"The unbroken fit ended with {code}: {_tail(folder)}")
    return torch.load(folder / "result.pt")


def plan(moments: list[list[tuple[str, str]]], kills: int, seed: int, twice: bool) -> list[Kill]:
    """Draw the moments of the kills, evenly over all kinds and setups.

    Args:
        moments: The kind and step of every moment, for each setup.
        kills: The number of kills.
        seed: The seed of the draw.
        twice: Whether the resumed fits are killed, too, soon after the resumption.

    Returns:
        The kills, without their outcomes.
    """
    draw, draw_again = random.Random(seed), random.Random(seed + 1)
    there = {kind for seen in moments for kind, _ in seen}
    kinds = [kind for kind in KINDS if kind in there]
    drawn: list[Kill] = []
    for number in range(kills):
        around, kind = divmod(number, len(kinds))
        setup = (kind + around) % len(moments)
        taken = {kill.moment for kill in drawn if kill.setup == setup}
        free = [moment for moment in range(len(moments[setup])) if moment not in taken]
        alike = [moment for moment in free if moments[setup][moment][0] == kinds[kind]]
        moment = draw.choice(alike or free)  # a setup may have no free moment of a rare kind
        again = draw_again.randrange(SOON) if twice else None
        kind_there, where = moments[setup][moment]
        drawn.append(Kill(number, setup, kind_there, moment, where, again))
    return drawn


def carry_out(kill: Kill, setup: Setup, whole: Path, folder: Path) -> None:
    """Kill a fit, resume it, and note how it compares with the unbroken one in ``whole``."""
    for moment, in_time in ((kill.moment, True), (kill.again, False)):
        if moment is None:
            continue
        code = forked(folder, partial(fit, setup, folder, moment))
        if code != -signal.SIGKILL and (code or in_time):  # the second kill may be after the end
            kill.error = f"ended with {code} before it was killed: {_tail(folder)}"
            return
        kill.killed += _boundaries(folder / "record.txt")
        (folder / "record.txt").unlink(missing_ok=True)
    code = forked(folder, partial(fit, setup, folder, None))
    resumed = _lines(folder / "record.txt")
    kill.resumed = _boundaries(folder / "record.txt")
    kill.first = first_difference(_lines(whole / "record.txt"), resumed)
    if code:
        kill.error = f"ended with {code} after it was resumed: {_tail(folder)}"
        kill.first = kill.first or f"It got to {resumed[-1] if resumed else 'no step'}"
        return
    result = torch.load(folder / "result.pt")
    kill.crossed = result["crossed"]
    kill.differs = differences(torch.load(whole / "result.pt"), result)


def forked(folder: Path, work: Callable[[], None]) -> int:
    """Do the work in a forked process, with all imports done; return the exit code, or minus the signal."""
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def differences(whole: dict[str, Any], resumed: dict[str, Any]) -> list[str]:
    """Return the tensors that differ in any bit, weights first."""
    found = []
    for part in ("weights", "bits", "precision", "R"):
        if whole[part].keys() != resumed[part].keys():
            found.append(f"{part}: {sorted(resumed[part])} instead of {sorted(whole[part])}")
            continue
        for name, value in whole[part].items():
            other = resumed[part][name]
            if (value.shape, value.dtype) != (other.shape, other.dtype):
                found.append(f"{part} {name}: {other.dtype} {list(other.shape)}")
            elif value.numpy().tobytes() != other.numpy().tobytes():
                unequal = (value != other) & ~(value.isnan() & other.isnan())
                found.append(f"{part} {name}: {int(unequal.sum())} of {value.numel()} values")
    return found


def first_difference(whole: list[str], resumed: list[str]) -> str:
    """Return the first step or boundary of the resumed fit that differs from the unbroken one."""
    known, steps = set(whole), {line.partition(":")[0]: line for line in whole}
    for line in resumed:
        step = line.partition(":")[0]
        if line not in known and step.startswith(("step", "boundary")):
            return f"{line} instead of {steps.get(step, 'nothing')}"
    return ""


def row(kill: Kill) -> str:
    """Return a line of the table, followed by the first difference, if there is one."""
    outcome = kill.error or (f"{len(kill.differs)} differ, {kill.differs[0]}" if kill.differs else "equal")
    if not kill.error and kill.crossed != list(range(TASKS)):
        outcome += f"; boundaries {kill.crossed}"
    crossed = " + ".join("".join(map(str, part)) or "-" for part in (kill.killed, kill.resumed))
    moment = f"{kill.moment}" if kill.again is None else f"{kill.moment}, {kill.again}"
    cells = (f"{kill.number:3}", f"{SETUPS[kill.setup]}", kill.kind, moment, kill.where, crossed, outcome)
    return " | ".join(cells) + (f"\n      {kill.first}" if kill.first else "")


def _boundaries(record: Path) -> list[int]:
    return [int(line.split()[1].rstrip(":")) for line in _lines(record) if line.startswith("boundary")]


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _tail(folder: Path) -> str:
    return (_lines(folder / "log.txt") or ["empty log"])[-1]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.run", description=__doc__)
    parser.add_argument("--kills", type=int, default=40, help="the number of fits to kill")
    parser.add_argument("--seed", type=int, default=0, help="the seed of the draw of moments")
    parser.add_argument(
        "--only", type=int, nargs="*", help="the numbers of the kills to carry out; all by default"
    )
    parser.add_argument("--twice", action="store_true", help="kill each fit again, soon after it was resumed")
    parser.add_argument("--control", action="store_true", help="also compare unbroken fits with each other")
    parser.add_argument("--steady", action="store_true", help="without dropout and noise on the data")
    parser.add_argument(
        "--across-devices",
        action="store_true",
        help="move files as between two devices",
    )
    parser.add_argument("--folder", type=Path, help="keep everything in this new folder")
    parser.add_argument("--json", action="store_true", help="print the outcomes as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
