"""Read data sets from the Hugging Face hub, through the ``datasets`` library."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.data.images import Images

# The repository, its configuration if it has several, and the columns of images and labels.
_SETS = {
    "mnist": (("ylecun/mnist",), "image", "label"),
    "fashion_mnist": (("zalando-datasets/fashion_mnist",), "image", "label"),
    "cifar10": (("uoft-cs/cifar10",), "img", "label"),
    "cifar100": (("uoft-cs/cifar100",), "img", "fine_label"),
    "svhn": (("ufldl-stanford/svhn", "cropped_digits"), "image", "label"),
}


def read_hub(name: str) -> Images:
    """Return a data set, downloaded unless it is in the library's cache.

    Args:
        name: The name of the data set.

    Returns:
        The data set.

    Raises:
        ValueError: If its place on the hub is unknown.
        ImportError: If ``datasets`` is not installed.
    """
    if name not in _SETS:
        raise ValueError(
            f"--data hub does not have {name}, only {', '.join(_SETS)}: give a folder that has it"
        )
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError("--data hub needs the datasets library: pip install datasets") from error
    source, images, labels = _SETS[name]
    parts = load_dataset(*source)
    return Images(
        *(
            array
            for part in ("train", "test")
            for array in (_images(parts[part][images]), np.asarray(parts[part][labels][:]))
        )
    )


def _images(pictures: Any) -> NDArray[Any]:
    return np.stack([np.asarray(picture) for picture in pictures])
