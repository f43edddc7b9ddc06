"""Image data sets from .npz files, as tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import TensorDataset


def load(folder: Path, name: str, standardise: bool = False) -> tuple[TensorDataset, TensorDataset]:
    """A data set with ``x_train``, ``y_train``, ``x_test`` and ``y_test``: training and test set.

    Args:
        folder: Where ``<name>.npz`` lies.
        name: Of the data set.
        standardise: Whether pixels are shifted and scaled to mean 0 and deviation 1 over the training set.

    Returns:
        Training and test set; images, in [0, 1] if not standardised, flattened (N, pixels), and int64 labels.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    path = folder / f"{name}.npz"
    if not path.exists():
        raise FileNotFoundError(f"--data {folder} holds no {name}.npz (x_train, y_train, x_test, y_test)")
    with np.load(path) as arrays:
        train, test = (torch.from_numpy(arrays[f"x_{part}"]).flatten(1) / 255.0 for part in ("train", "test"))
        labels = [torch.from_numpy(arrays[f"y_{part}"]).long() for part in ("train", "test")]
    if standardise:
        deviation, mean = torch.std_mean(train)
        train, test = (train - mean) / deviation, (test - mean) / deviation
    return TensorDataset(train, labels[0]), TensorDataset(test, labels[1])
