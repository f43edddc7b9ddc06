"""Runs the command line as ``python -m lightning_blip``."""

from lightning_blip.cli.main import main

main()
