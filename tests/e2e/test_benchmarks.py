"""A benchmark that no longer runs is a claim that nobody can check."""

from __future__ import annotations

import json
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


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_a_cpu() -> None:
    """Ours, with and without fp8; what it measures there means nothing."""
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--device=cpu", "--shape=tiny", "--layers=2"]
    done = subprocess.run(
        [*command, "--steps=2", "--max-tokens=1024", "--contestants", "ours", "ours, fp8"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    assert all(results[name]["tokens_per_second"] > 0 for name in ("ours", "ours, fp8"))
