"""Read the Python batches in which CIFAR-10 and CIFAR-100 are published."""

from __future__ import annotations

import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.data.images import Images


def read_cifar10(folder: Path) -> Images | None:
    """Read ``cifar-10-batches-py`` or ``cifar-10-python.tar.gz``; None if there is neither."""
    batches = [f"data_batch_{i}" for i in range(1, 6)]
    return _read(folder, "cifar-10-batches-py", "cifar-10-python.tar.gz", batches, "test_batch", b"labels")


def read_cifar100(folder: Path) -> Images | None:
    """Read ``cifar-100-python`` or its ``.tar.gz``, with the fine labels; None if there is neither."""
    return _read(folder, "cifar-100-python", "cifar-100-python.tar.gz", ["train"], "test", b"fine_labels")


def _read(
    folder: Path, directory: str, archive: str, train: Sequence[str], test: str, labels: bytes
) -> Images | None:
    if (folder / directory).is_dir():
        files = {name: (folder / directory / name).read_bytes() for name in (*train, test)}
    elif (folder / archive).exists():
        with tarfile.open(folder / archive) as tar:
            files = {name: _member(tar, f"{directory}/{name}") for name in (*train, test)}
    else:
        return None
    batches = {name: pickle.loads(data, encoding="bytes") for name, data in files.items()}
    return Images(
        np.concatenate([_pictures(batches[name]) for name in train]),
        np.concatenate([np.asarray(batches[name][labels]) for name in train]),
        _pictures(batches[test]),
        np.asarray(batches[test][labels]),
    )


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    assert file is not None  # a regular file, not a directory
    return file.read()


def _pictures(batch: dict[bytes, Any]) -> NDArray[Any]:
    return np.asarray(batch[b"data"]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
