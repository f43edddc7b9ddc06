"""Read mini-ImageNet, 84x84 in colour, which is distributed as pickles and as folders of pictures.

In both formats the classes are those of training, validation and test of few-shot learning together. The
first 500 pictures of each class are for training, the other 100 for testing.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from benchmarks.data.images import Images, by_class
from benchmarks.data.pictures import SUFFIXES, read_pictures

_FOLDERS = ("mini_imagenet", "mini-imagenet")


def read_pickles(folder: Path) -> Images | None:
    """Read ``mini-imagenet-cache-train.pkl``, ``-val`` and ``-test``, here or in a folder of the set's name.

    Each has ``image_data`` (N, 84, 84, 3), and in ``class_dict`` the indices of each class.

    Args:
        folder: The folder of the data.

    Returns:
        The data set; None if one of the three is missing.
    """
    for place in (folder, *(folder / inside for inside in _FOLDERS)):
        paths = [place / f"mini-imagenet-cache-{part}.pkl" for part in ("train", "val", "test")]
        if all(path.exists() for path in paths):
            return _split(images for path in paths for images in _classes(path))
    return None


def read_folders(folder: Path) -> Images | None:
    """Read a folder of the set's name that contains, at any depth, one folder of pictures per class.

    Args:
        folder: The folder of the data.

    Returns:
        The data set, its classes in the order of the folders' names; None if there are none.
    """
    pictures = (path for inside in _FOLDERS for path in (folder / inside).rglob("*"))
    classes = {path.parent for path in pictures if path.suffix in SUFFIXES}
    if not classes:
        return None
    return _split(
        read_pictures(path, "RGB", (84, 84)) for path in sorted(classes, key=lambda path: path.name)
    )


def _classes(path: Path) -> list[NDArray[Any]]:
    # Some were pickled by Python 2.
    held = pickle.loads(path.read_bytes(), encoding="latin1")
    return [held["image_data"][list(indices)] for indices in held["class_dict"].values()]


def _split(classes: Iterable[NDArray[Any]]) -> Images:
    parts = [(images[:500], images[500:]) for images in classes]
    return by_class([train for train, _ in parts], [test for _, test in parts])
