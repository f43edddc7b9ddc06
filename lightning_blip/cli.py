"""The command line: ``lightning-blip demo``."""

from __future__ import annotations


def main() -> None:
    """Runs the command that the command line asks for; ``--help`` tells which there are."""
    try:
        from jsonargparse import auto_cli

        from lightning_blip.demo import demo
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error.name} is missing: pip install 'lightning-blip[demo]'") from error
    auto_cli({"demo": demo}, prog="lightning-blip")
