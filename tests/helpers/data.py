"""Made-up images in the shape of the data sets of the benchmarks."""

import numpy as np

# Classes, images of each class in training and in test, and their shape.
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
    """Return images that differ by class, with noise in each, and their labels, for training and test."""
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
