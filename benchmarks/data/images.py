"""The result of every reader: the images and labels of a data set, as stored in its files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Images(NamedTuple):
    """A data set.

    Attributes:
        x_train: Training images (N, H, W) or (N, H, W, 3), uint8.
        y_train: Their labels (N,), from 0.
        x_test: Test images, likewise.
        y_test: Their labels.
    """

    x_train: NDArray[Any]
    y_train: NDArray[Any]
    x_test: NDArray[Any]
    y_test: NDArray[Any]


def by_class(train: Sequence[NDArray[Any]], test: Sequence[NDArray[Any]]) -> Images:
    """Return the data set of these classes, whose labels count up in order.

    Args:
        train: The training images of each class.
        test: The test images of each class.

    Returns:
        The data set.
    """
    return Images(np.concatenate(train), _labels(train), np.concatenate(test), _labels(test))


def _labels(classes: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return np.repeat(np.arange(len(classes)), [len(images) for images in classes])
