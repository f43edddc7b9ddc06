"""``lightning-blip fit``, ``validate`` and ``test``: LightningCLI with BLIP and ForgettingCurves."""

from __future__ import annotations

import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonargparse  # noqa: F401  LightningCLI reports that it is missing later and less clearly
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from torch.optim import Optimizer

from lightning_blip.blip import BLIP
from lightning_blip.results.curves import ForgettingCurves
from lightning_blip.tasks.datamodule import TaskSequenceDataModule


class TaskSequenceCLI(LightningCLI):
    """LightningCLI for a sequence of tasks, with the options ``blip`` and ``curves``: callbacks, or null."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the commands, each with the arguments of the Trainer's method that are no options."""
        skipped = LightningCLI.subcommands()
        return {name: skipped[name] for name in ("fit", "validate", "test")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of the two callbacks."""
        for name, kind in (("blip", BLIP), ("curves", ForgettingCurves)):
            default = {"class_path": f"lightning_blip.{kind.__name__}"}
            parser.add_argument(
                f"--{name}", type=kind | None, default=default, help="a class, or null to leave it out"
            )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line; LightningCLI would warn about arguments that are passed to it."""
        self.config = parser.parse_args(args)

    @staticmethod
    def configure_optimizers(
        lightning_module: LightningModule, optimizer: Optimizer, lr_scheduler: Any = None
    ) -> Any:
        """Return copies of the optimizer and the scheduler, so that each task starts with unused ones."""
        own = {id(parameter): parameter for parameter in lightning_module.parameters()}
        optimizer, lr_scheduler = deepcopy((optimizer, lr_scheduler), own)
        return LightningCLI.configure_optimizers(lightning_module, optimizer, lr_scheduler)

    def before_instantiate_classes(self) -> None:
        """Leave out callbacks that are null."""
        given = [name for name in ("blip", "curves") if self._get(self.config, name) is not None]
        self._parser(self.subcommand).callback_keys.extend(given)

    def after_instantiate_classes(self) -> None:
        """Replace ``last`` by the newest checkpoint of an earlier run, which lies in another log folder."""
        options = self.config_init[self.subcommand]
        if options["ckpt_path"] == "last":
            options["ckpt_path"] = _last_checkpoint(self.trainer) or "last"


def learn(arguments: list[str]) -> None:
    """Run ``fit``, ``validate`` or ``test``.

    Args:
        arguments: The command line, which begins with the command.
    """
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # so that the user's own classes are found
    TaskSequenceCLI(
        LightningModule,
        TaskSequenceDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        # A resumed run may write into the same log folder.
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"prog": "lightning-blip"},
        args=arguments,
    )


def _last_checkpoint(trainer: Trainer) -> Path | None:
    """Return the newest checkpoint below the Trainer's folder, or None if a callback has its own folder."""
    if any(isinstance(one, ModelCheckpoint) and one.dirpath for one in trainer.checkpoint_callbacks):
        return None
    found = Path(trainer.default_root_dir).rglob("*.ckpt")
    return max(found, key=lambda path: path.stat().st_mtime, default=None)
