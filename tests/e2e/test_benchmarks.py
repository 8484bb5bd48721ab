"""A benchmark that no longer runs is a claim that nobody can check."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_data_benchmark_runs() -> None:
    command = [sys.executable, str(ROOT / "benchmarks/data_scale.py"), "--quick"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "10,000" in done.stdout.splitlines()[-1]
