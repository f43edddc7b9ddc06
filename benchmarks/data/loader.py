"""Load a data set in whichever format a folder holds it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from benchmarks.data import mini_imagenet
from benchmarks.data.arrays import read_jpeg_npz, read_npz
from benchmarks.data.cifar import read_cifar10, read_cifar100
from benchmarks.data.hub import read_hub
from benchmarks.data.idx import FOLDERS, read_idx
from benchmarks.data.images import Images
from benchmarks.data.looks import Look, flat
from benchmarks.data.notmnist import read_notmnist
from benchmarks.data.svhn import read_svhn

Reader = Callable[[Path], Images | None]
Form = tuple[str, Reader]


def _npz(name: str) -> Form:
    return f"{name}.npz (x_train, y_train, x_test, y_test)", partial(read_npz, name=name)


def _idx(name: str) -> Form:
    form = f"train-images-idx3-ubyte.gz and the three other files in a folder {' or '.join(FOLDERS[name])}"
    return form, partial(read_idx, name=name)


# The formats of each data set in the order in which they are tried: a description, and a reader.
READERS: dict[str, tuple[Form, ...]] = {
    "mnist": (_npz("mnist"), _idx("mnist")),
    "fashion_mnist": (_npz("fashion_mnist"), _idx("fashion_mnist")),
    "cifar10": (
        _npz("cifar10"),
        ("cifar10_jpeg.npz", partial(read_jpeg_npz, name="cifar10")),
        ("cifar-10-batches-py or cifar-10-python.tar.gz", read_cifar10),
    ),
    "cifar100": (_npz("cifar100"), ("cifar-100-python or cifar-100-python.tar.gz", read_cifar100)),
    "svhn": (_npz("svhn"), ("train_32x32.mat and test_32x32.mat, here or in a folder svhn", read_svhn)),
    "notmnist": (
        _npz("notmnist"),
        ("notMNIST_small, with or without notMNIST_large, with folders A to J of pictures", read_notmnist),
    ),
    "mini_imagenet": (
        _npz("mini_imagenet"),
        ("mini-imagenet-cache-train.pkl, -val.pkl and -test.pkl", mini_imagenet.read_pickles),
        ("a folder mini_imagenet with one folder of pictures per class", mini_imagenet.read_folders),
    ),
}


def load(folder: Path, name: str, look: Look = flat) -> tuple[TensorDataset, TensorDataset]:
    """Return a data set, read from the first of its formats that exists.

    Args:
        folder: The folder of the data; ``Path("hub")``, if there is no such folder, is the Hugging Face hub.
        name: The name of the data set, one of :data:`READERS`.
        look: Prepares the images for a network; see :mod:`benchmarks.data.looks`.

    Returns:
        Training and test set of float32 images and int64 labels.

    Raises:
        FileNotFoundError: If the folder has none of the formats.
        ValueError: If the hub does not have the data set.
        ImportError: If the hub is asked for, and the ``datasets`` library is not installed.
    """
    images = next((found for _, read in READERS[name] if (found := read(folder)) is not None), None)
    if images is None and folder == Path("hub"):
        images = read_hub(name)
    if images is None:
        forms = "".join(f"\n  {form}" for form, _ in READERS[name])
        raise FileNotFoundError(
            f"--data {folder} does not hold the data set {name}: give a folder with one of:{forms}"
        )
    train, test = look(name, torch.from_numpy(images.x_train), torch.from_numpy(images.x_test))
    return (
        TensorDataset(train, torch.from_numpy(images.y_train).long()),
        TensorDataset(test, torch.from_numpy(images.y_test).long()),
    )
