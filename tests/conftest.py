"""What every test may ask for."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

# Tiny tensors: more threads only wait for each other. Before torch is loaded, and for every subprocess too.
os.environ["OMP_NUM_THREADS"] = "1"
# Tests neither read nor fill the user's own cache; one of their own is gone with the process.
_CACHE = tempfile.TemporaryDirectory(prefix="lorasmith-cache-")
os.environ["LORASMITH_CACHE"] = _CACHE.name

_SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference data that lies beside the checkout and may not be copied into it."""
    if not (_SHARED / "golden").is_dir():
        pytest.skip("no reference data beside this checkout (../shared)")
    return _SHARED
