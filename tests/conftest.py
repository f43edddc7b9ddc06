"""Settings and fixtures of all tests."""

from pathlib import Path

import pytest
import torch
from hypothesis import settings

# No test fails because a machine is slow, and every machine runs the same examples.
settings.register_profile("steady", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("steady")

# Tests run in parallel, one per core.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Give every test the same random numbers."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Run every test in a temporary folder, because a fit may write into the working directory."""
    monkeypatch.chdir(tmp_path)
