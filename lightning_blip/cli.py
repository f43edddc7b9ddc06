"""The command line: ``lightning-blip demo`` and ``lightning-blip report``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lightning_blip.report import report


def main() -> None:
    """Runs the command that the command line asks for; ``--help`` tells which there are."""
    if sys.argv[1:2] == ["report"]:
        _report(sys.argv[2:])
        return
    try:
        from jsonargparse import auto_cli

        from lightning_blip.demo import demo
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error.name} is missing: pip install 'lightning-blip[demo]'") from error
    auto_cli({"demo": demo, "report": report}, prog="lightning-blip")


def _report(arguments: list[str]) -> None:
    """A parser of its own, since auto_cli takes no list of paths one after another."""
    parser = argparse.ArgumentParser(
        "lightning-blip report", description="One page that shows a run, or several side by side."
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN_DIR", help="in or below which a forgetting.json lies"
    )
    parser.add_argument("--output", type=Path, help="by default report.html, beside the records")
    try:
        print(f"Report: {report(**vars(parser.parse_args(arguments)))}")
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
