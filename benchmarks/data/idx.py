"""Read the ubyte files in which MNIST and similar data sets are published."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.data.images import Images

FOLDERS = {
    "mnist": ("mnist", "MNIST", "MNIST/raw"),
    "fashion_mnist": ("fashion_mnist", "fashion-mnist", "FashionMNIST", "FashionMNIST/raw"),
}
_FILES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


def read_idx(folder: Path, name: str) -> Images | None:
    """Read ``train-images-idx3-ubyte`` and the three other files, gzipped or not; None if one is missing.

    These file names are the same for every such data set, so that the folder must have the name of the set.
    """
    places = [folder / inside for inside in FOLDERS[name]]
    if folder.name in FOLDERS[name]:
        places.append(folder)
    for place in places:
        paths = [_either(place / f"{file}-ubyte") for file in _FILES]
        if all(path.exists() for path in paths):
            return Images(*(_array(path) for path in paths))
    return None


def _either(path: Path) -> Path:
    return path if path.exists() else path.with_name(f"{path.name}.gz")


def _array(path: Path) -> NDArray[Any]:
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    # The header: two zeros, the type, the number of dimensions, then each dimension as a big-endian int32.
    dimensions = data[3]
    shape = np.frombuffer(data, ">i4", dimensions, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy()
