"""What all tests share."""

from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Timing never decides a test, and the same examples run everywhere.
settings.register_profile("steady", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("steady")

# Tests run side by side, one a core.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a fit writes into the working directory must not lie in the repository."""
    monkeypatch.chdir(tmp_path)
