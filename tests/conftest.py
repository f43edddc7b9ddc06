"""What all tests share."""

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
