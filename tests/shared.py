"""The real vocabularies and data sets that may lie beside a checkout; they are never part of it."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"

needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="needs the real tokenizers and data sets beside the checkout (../shared)"
)
