"""Every test here wants a CUDA device; without one it is skipped and says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _full_fp32_products() -> None:
    """TF32 off: fp32 is compared with fp32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
