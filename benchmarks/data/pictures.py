"""Reads a folder of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".JPEG")


def read_pictures(folder: Path, mode: str, size: tuple[int, int]) -> NDArray[Any]:
    """All pictures that lie in a folder, in the order of their names.

    Files that cannot be read as pictures are passed over, and their number is printed: notMNIST has some.

    Args:
        folder: Where they lie.
        mode: ``"L"`` for grey, ``"RGB"`` for colour.
        size: Width and height that each is brought to.

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
        print(f"{folder}: {len(paths) - len(pictures)} of {len(paths)} pictures are broken and passed over")
    return np.stack(pictures)
