"""The Triton twins without a GPU: their numbers in triton's interpreter, and when they are chosen."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from lorasmith.kernels.twins import triton_twin

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
@needs_triton
def test_every_twin_is_its_reference() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "LORASMITH_TRITON": "1"}
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("interpreted.py"))],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_every_twin_compiles_for_a_gpu(capability: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compiled.py")), str(capability)],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = {"_normalise", "_sum_over_rows", "_multiply", "_differentiate", "_turn", "_drop"}
    kernels.add("_read")
    assert set(done.stdout.split()) == (kernels | {"_quantise"} if capability >= 89 else kernels)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 is set")
def test_a_cpu_keeps_to_torch_and_never_loads_triton() -> None:
    assert triton_twin("rms_norm", torch.empty(1)) is None
    code = (
        "import sys, torch; from lorasmith.ops.rms_norm import rms_norm; "
        "rms_norm(torch.ones(2), torch.ones(2), 1e-6); assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
