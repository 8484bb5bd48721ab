"""What every test may ask for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other

_SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference data that lies beside the checkout and may not be copied into it."""
    if not (_SHARED / "golden").is_dir():
        pytest.skip("no reference data beside this checkout (../shared)")
    return _SHARED
