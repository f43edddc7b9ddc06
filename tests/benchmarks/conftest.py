"""Data sets made up for the tests of the benchmarks."""

import numpy as np
import pytest

# Classes, images of each in training and in test, and shape.
SETS = {
    "mnist": (10, 4, (28, 28)),
    "fashion_mnist": (10, 4, (28, 28)),
    "notmnist": (10, 2, (28, 28)),
    "cifar10": (10, 2, (32, 32, 3)),
    "cifar100": (100, 1, (32, 32, 3)),
    "svhn": (10, 2, (32, 32, 3)),
    "mini_imagenet": (100, 1, (84, 84, 3)),
}


def made_up(classes, each, shape):
    """Images of classes that can be told apart: each class has its own look, each image its own noise."""
    generator = np.random.default_rng(0)
    labels = np.arange(classes * each) % classes
    looks = generator.integers(0, 200, (classes, *shape))
    arrays = {}
    for part in ("train", "test"):
        noise = generator.integers(0, 56, (len(labels), *shape))
        arrays |= {
            f"x_{part}": (looks[labels] + noise).astype(np.uint8),
            f"y_{part}": labels.astype(np.uint8),
        }
    return arrays


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with every data set, a few images of each class."""
    folder = tmp_path_factory.mktemp("data")
    for name, size in SETS.items():
        np.savez(folder / f"{name}.npz", **made_up(*size))
    return folder
