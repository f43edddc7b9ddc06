"""Kills fits at counted moments, resumes them, and tells what differs from the fit that was not killed.

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
# About two epochs and the boundary between them.
SOON = 60


@dataclass
class Kill:
    """A kill, and what came of it.

    Attributes:
        number: Its place in the plan.
        setup: The place of its setup in ``SETUPS``.
        kind: What was happening.
        moment: When, as the number of things that had happened before.
        where: The step that was being taken, or had been last.
        again: The moment at which the resumed fit is killed, too, counted from where it was resumed.
        killed: The boundaries that were crossed before the last kill.
        resumed: Those after it. One may have been crossed twice, if no checkpoint held it yet.
        crossed: Those behind the final state: each one once.
        differs: What is not bit for bit that of the unbroken fit.
        first: Where the resumed fit first left the way of the unbroken one.
        error: What kept the fit from being killed, or from being resumed.
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
        """Whether nothing tells the resumed fit from the unbroken one."""
        return not self.differs and not self.error and self.crossed == list(range(TASKS))


def main() -> None:
    """Kills, resumes, compares, and prints."""
    given = _arguments()
    torch.set_num_threads(1)
    setups = [replace(setup, noise=not given.steady, across=given.across_devices) for setup in SETUPS]
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.folder or Path(temporary) / "runs").resolve()
        folder.mkdir()  # a checkpoint that lay there would be taken for one's own
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
        sys.stdout.write(f"{good} of {len(kills)} ended as the fit that was not killed\n")


def unbroken(setup: Setup, folder: Path) -> dict[str, Any]:
    """What a fit that is not killed comes to."""
    if code := forked(folder, partial(fit, setup, folder, None)):
        raise RuntimeError(f"The unbroken fit ended with {code}: {_tail(folder)}")
    return torch.load(folder / "result.pt")


def plan(moments: list[list[tuple[str, str]]], kills: int, seed: int, twice: bool) -> list[Kill]:
    """Draws moments to kill at, of all kinds and in all setups alike.

    Args:
        moments: Kind and place of every moment, for each setup.
        kills: How many.
        seed: Of the draw.
        twice: Whether the resumed fits are killed as well, soon after.
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
        moment = draw.choice(alike or free)  # some kinds are rare
        again = draw_again.randrange(SOON) if twice else None
        kind_there, where = moments[setup][moment]
        drawn.append(Kill(number, setup, kind_there, moment, where, again))
    return drawn


def carry_out(kill: Kill, setup: Setup, whole: Path, folder: Path) -> None:
    """Kills a fit, resumes it, and takes down how it compares with the whole one."""
    for moment, in_time in ((kill.moment, True), (kill.again, False)):
        if moment is None:
            continue
        code = forked(folder, partial(fit, setup, folder, moment))
        if code != -signal.SIGKILL and (code or in_time):  # the second kill may come too late
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
        kill.first = kill.first or f"It came as far as {resumed[-1] if resumed else 'nothing'}"
        return
    result = torch.load(folder / "result.pt")
    kill.crossed = result["crossed"]
    kill.differs = differences(torch.load(whole / "result.pt"), result)


def forked(folder: Path, work: Callable[[], None]) -> int:
    """Does work in a process of its own, all imports done; its exit code, or minus its signal."""
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
    """The tensors that are not the same bit for bit, those that tell most first."""
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
    """The first step or boundary that the resumed fit does not share with the whole one."""
    known, steps = set(whole), {line.partition(":")[0]: line for line in whole}
    for line in resumed:
        step = line.partition(":")[0]
        if line not in known and step.startswith(("step", "boundary")):
            return f"{line} instead of {steps.get(step, 'nothing')}"
    return ""


def row(kill: Kill) -> str:
    """A line of the table, and one more that tells where things went wrong, if they did."""
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
    return (_lines(folder / "log.txt") or ["no word"])[-1]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.run", description=__doc__)
    parser.add_argument("--kills", type=int, default=40, help="how many fits are killed")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of moments")
    parser.add_argument(
        "--only", type=int, nargs="*", help="the numbers of the kills to carry out; all by default"
    )
    parser.add_argument("--twice", action="store_true", help="kill each fit again, soon after it was resumed")
    parser.add_argument("--control", action="store_true", help="also compare unbroken fits with each other")
    parser.add_argument("--steady", action="store_true", help="no dropout, and no noise on the data")
    parser.add_argument(
        "--across-devices", action="store_true", help="as where temporary files are on another device"
    )
    parser.add_argument("--folder", type=Path, help="keep everything in this new folder")
    parser.add_argument("--json", action="store_true", help="print the outcomes for programs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
