"""Read a folder of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".JPEG")


def read_pictures(folder: Path, mode: str, size: tuple[int, int]) -> NDArray[Any]:
    """Return all pictures in a folder, in the order of their names.

    Files that cannot be read are skipped, and their number is printed: notMNIST has some.

    Args:
        folder: The folder.
        mode: ``"L"`` for grey, ``"RGB"`` for colour.
        size: Width and height to which the pictures are scaled.

    Returns:
        Images (N, H, W) or (N, H, W, 3).
    """
    paths = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    pictures = []
    for path in paths:
        try:
            with Image.open(path) as picture:
                pictures.append(np.asarray(picture.convert(mode).resize(size)))
        except OSError:
            continue
    if len(pictures) < len(paths):
        print(f"{folder}: {len(paths) - len(pictures)} of {len(paths)} pictures are broken and skipped")
    return np.stack(pictures)
