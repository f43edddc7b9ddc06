"""Read the folders of pictures in which notMNIST is published."""

from __future__ import annotations

from pathlib import Path

from benchmarks.data.images import Images, by_class
from benchmarks.data.pictures import read_pictures


def read_notmnist(folder: Path) -> Images | None:
    """Read ``notMNIST_large`` for training and ``notMNIST_small`` for testing, with folders A to J.

    If there is only the small one, every tenth picture of each letter is for testing.

    Args:
        folder: The folder of the data.

    Returns:
        The data set; None if there is no ``notMNIST_small``.
    """
    if not (folder / "notMNIST_small").is_dir():
        return None
    letters, *more = (
        [read_pictures(folder / size / letter, "L", (28, 28)) for letter in "ABCDEFGHIJ"]
        for size in ("notMNIST_small", "notMNIST_large")
        if (folder / size).is_dir()
    )
    if more:
        return by_class(more[0], letters)
    tenth = [[i for i in range(len(pictures)) if i % 10 != 9] for pictures in letters]
    return by_class(
        [pictures[chosen] for pictures, chosen in zip(letters, tenth, strict=True)],
        [pictures[9::10] for pictures in letters],
    )
