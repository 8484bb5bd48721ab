"""docs/performance.md says what the benchmarks measured: its tables are the rows of their JSON files."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
tables = SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks/tables.py")))
MEASURED = [name for name in tables.TABLES if tables.rows_of(name)]


def test_something_was_measured() -> None:
    assert {"throughput", "generation", "data_scale"} <= set(MEASURED)


@pytest.mark.parametrize("name", MEASURED)
def test_the_page_has_the_rows_that_were_measured(name: str) -> None:
    missing = [row for row in tables.rows_of(name) if row not in PAGE]
    assert missing == [], "python benchmarks/tables.py prints what to paste"


def test_levers_and_ops_are_told_as_rows() -> None:
    lever = {"lever": "all levers on", "seconds": 0.5, "times": 1.0, "peak_bytes": 20_000_000}
    other = {"lever": "packing", "seconds": 1.25, "times": 2.5, "peak_bytes": 7_000_000}
    assert list(tables.levers({"results": [other, lever]})) == [
        "| packing | 1.25 s | 2.50 | 7 MB | 0.35 |",
        "| all levers on | 0.50 s | 1.00 | 20 MB | 1.00 |",
    ]
    took = {"forward_ms": 1.0, "backward_ms": 2.0, "both_ms": 3.0}
    op = {"case": "norm", "ours": took, "reference": took, "library": {**took, "both_ms": 6.0}}
    row = "| norm | 1.00 + 2.00 | 1.00 + 2.00 | 1.00 + 2.00 | 2.00 |"
    assert list(tables.ops({"results": [op]})) == [row]
