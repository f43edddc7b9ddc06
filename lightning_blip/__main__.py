"""``python -m lightning_blip`` is the command line."""

from lightning_blip.cli.main import main

main()
