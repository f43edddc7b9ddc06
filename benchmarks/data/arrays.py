"""Read .npz files of arrays, or of images as JPEG."""

from __future__ import annotations

import io
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.data.images import Images


def read_npz(folder: Path, name: str) -> Images | None:
    """Read ``<name>.npz`` with ``x_train``, ``y_train``, ``x_test`` and ``y_test``; None if there is none."""
    path = folder / f"{name}.npz"
    if not path.exists():
        return None
    with np.load(path) as arrays:
        return Images(*(arrays[field] for field in Images._fields))


def read_jpeg_npz(folder: Path, name: str) -> Images | None:
    """Read ``<name>_jpeg.npz``, decoded once into the user's cache; None if there is none.

    For ``train`` and for ``test`` it holds ``jpeg_…``, the bytes of all files in a row, ``size_…``, the
    number of bytes of each, and the labels ``y_…``.
    """
    path = folder / f"{name}_jpeg.npz"
    if not path.exists():
        return None
    cache = Path.home() / ".cache" / "lightning_blip"
    key = f"{name}-{sha256(path.read_bytes()).hexdigest()[:16]}"
    decoded = read_npz(cache, key)
    if decoded is None:
        with np.load(path) as arrays:
            decoded = Images(
                *(
                    array
                    for part in ("train", "test")
                    for array in (
                        _decode(arrays[f"jpeg_{part}"], arrays[f"size_{part}"]),
                        arrays[f"y_{part}"],
                    )
                )
            )
        cache.mkdir(parents=True, exist_ok=True)
        # Parallel runs may decode at the same time, and must not read a file that is being written.
        unfinished = cache / f"{key}-{np.random.default_rng().integers(2**62)}.part.npz"
        np.savez(unfinished, **decoded._asdict())
        unfinished.replace(cache / f"{key}.npz")
    return decoded


def _decode(blob: NDArray[Any], sizes: NDArray[Any]) -> NDArray[Any]:
    data, ends = blob.tobytes(), np.cumsum(sizes)
    files = (data[end - size : end] for size, end in zip(sizes, ends, strict=True))
    return np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])
