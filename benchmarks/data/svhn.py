"""Read the .mat files in which the cropped digits of SVHN are published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from scipy.io import loadmat

from benchmarks.data.images import Images


def read_svhn(folder: Path) -> Images | None:
    """Read ``train_32x32.mat`` and ``test_32x32.mat``, here or in ``svhn``; None if one is missing."""
    for place in (folder, folder / "svhn", folder / "SVHN"):
        paths = [place / f"{part}_32x32.mat" for part in ("train", "test")]
        if all(path.exists() for path in paths):
            return Images(*_part(paths[0]), *_part(paths[1]))
    return None


def _part(path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    arrays = loadmat(path)
    # The digit 0 is labelled 10.
    return arrays["X"].transpose(3, 0, 1, 2), arrays["y"].flatten() % 10
