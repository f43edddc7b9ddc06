"""The made-up data of the tests of the benchmarks."""

import numpy as np
import pytest

from tests.helpers.data import SETS, made_up


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Return a folder with every data set, a few images of each class."""
    folder = tmp_path_factory.mktemp("data")
    for name, size in SETS.items():
        np.savez(folder / f"{name}.npz", **made_up(*size))
    return folder
