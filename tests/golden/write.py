"""Write the checkpoints of the current version. Run this once for each new version."""

from pathlib import Path

import pytorch_lightning as pl
import torch

from lightning_blip import BLIP
from lightning_blip.checkpoint import VERSION
from tests.helpers.networks import QUIET, Net, pairs

FOLDER = Path(__file__).parent
BLIPS = {
    "diagonal": lambda: BLIP(prior=1e-4),
    "kronecker": lambda: BLIP(basis="kronecker", prior=1e-4),
    "paper": BLIP.paper,
}


def main() -> None:
    """Train on two of three tasks and for one epoch of the third, and save a checkpoint of each kind."""
    for name, make in BLIPS.items():
        torch.manual_seed(0)
        trainer = pl.Trainer(**QUIET, callbacks=[make()], max_epochs=5)
        trainer.fit(Net(heads=3, norm=True), datamodule=pairs())
        trainer.save_checkpoint(FOLDER / f"version-{VERSION}-{name}.ckpt")


if __name__ == "__main__":
    main()
