"""The same seed on the same machine is the same adapter, whatever the process around it looks like."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lorasmith as ls

ASSETS = Path(ls.__file__).parent / "assets"
Trained = Callable[..., Path]
SURROUNDINGS = {
    "the same again": {},
    "another hash seed": {"PYTHONHASHSEED": "4711"},
    "the C locale": {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "a Chinese locale in GB18030": {"LC_ALL": "zh_CN.GB18030", "LANG": "zh_CN.GB18030"},
    "another time zone": {"TZ": "Asia/Kathmandu"},
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of different scripts: what a locale could change."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    text = (ASSETS / "persona.jsonl").read_text(encoding="utf-8")
    foreign = '{"instruction": "你是谁？", "input": "", "output": "灯塔守护人 Ünïcödé."}\n'
    path.write_text(text + foreign, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def adapter(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The weights file of a run in a process of its own, with dropout and a held-out share."""

    def trained(*more: str, **surroundings: str) -> Path:
        run = tmp_path_factory.mktemp("determinism") / "run"
        keys = ("train.max_steps=6", "train.batch_size=4", "train.eval_steps=3", "lora.lora_dropout=0.2")
        sets = [*keys, "data.eval=0.1", "model.dtype=fp32", *more]
        where = ["--model", str(ASSETS / "tiny"), "--data", str(rows), "-o", str(run)]
        command = [sys.executable, "-m", "lorasmith", "train", *where]
        told = subprocess.run(
            [*command, *(item for key in sets for item in ("--set", key))],
            env=os.environ | {"PYTHONHASHSEED": "0", "TZ": "UTC", "OMP_NUM_THREADS": "1"} | surroundings,
            capture_output=True,
            timeout=300,
        )
        assert told.returncode == 0, told.stderr.decode(errors="replace")
        return run / "adapter_model.safetensors"

    return trained


@pytest.fixture(scope="module")
def first(adapter: Trained) -> Path:
    return adapter()


@pytest.mark.slow
@pytest.mark.parametrize("surroundings", SURROUNDINGS)
def test_the_surroundings_change_no_bit(adapter: Trained, first: Path, surroundings: str) -> None:
    assert adapter(**SURROUNDINGS[surroundings]).read_bytes() == first.read_bytes()


@pytest.mark.slow
def test_more_threads_change_no_more_than_rounding(adapter: Trained, first: Path) -> None:
    """Sums in another order: within 1e-6 of the adapter's own size."""
    one, four = load_file(first), load_file(adapter(OMP_NUM_THREADS="4"))
    assert one.keys() == four.keys()
    flat = [torch.cat([tensors[name].flatten().double() for name in sorted(one)]) for tensors in (one, four)]
    assert (flat[0] - flat[1]).norm() <= 1e-6 * flat[0].norm()


@pytest.mark.slow
def test_another_seed_is_another_adapter(adapter: Trained, first: Path) -> None:
    """Negative control: the bytes compared above do depend on what is drawn."""
    assert adapter("train.seed=7").read_bytes() != first.read_bytes()
