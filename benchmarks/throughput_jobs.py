"""The contestants of throughput.py and the processes that they run in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorasmith.config import TrainConfig

PEERS = Path(__file__).parent / "peers"
SHARES_PREFIXES = "share_prefixes" in TrainConfig.model_fields


@dataclass(frozen=True)
class Contestant:
    name: str
    title: str
    script: str
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: str = "own"
    """Which Python runs it: "own" (this one), "trl" or "llamafactory"."""


PACKING_SETTINGS: tuple[Mapping[str, Any], ...] = (
    {"packs": 1, "accumulate": 1, "attention": "sdpa"},
    {"packs": 2, "accumulate": 1, "attention": "sdpa"},
    {"packs": 1, "accumulate": 2, "attention": "sdpa"},
    {"packs": 1, "accumulate": 1, "attention": "eager"},
)
"""What --search tries for a trainer that packs; without it, the first: 16 rows of a step in one pack."""


def _packing(peer: str, title: str) -> Contestant:
    """A trainer that packs rows by itself, in an environment of its own."""
    return Contestant(peer, title, f"{peer}_packing.py", PACKING_SETTINGS[0], environment=peer)


def _ours(name: str, title: str, *, share_prefixes: bool) -> Contestant:
    options = {"share_prefixes": share_prefixes if SHARES_PREFIXES else None, "dropout": 0.1}
    return Contestant(name, title, "ours.py", options)


CONTESTANTS = (
    Contestant("tutorial", "(i) tutorial's script", "tutorial.py", {"tuned": False, "micro_batch": 8}),
    Contestant("expert", "(ii) the same, tuned", "tutorial.py", {"tuned": True, "micro_batch": 8}),
    _packing("trl", "(iii) TRL, packing"),
    _packing("llamafactory", "(iii) LLaMA-Factory, neat_packing"),
    _ours("ours", "(iv) Lorasmith", share_prefixes=True),
    _ours("ours-unshared", "(v) Lorasmith, no sharing", share_prefixes=False),
)
BY_NAME = {contestant.name: contestant for contestant in CONTESTANTS}


@dataclass(frozen=True)
class Setting:
    """What is the same for every contestant of a run. `rows` and `model` are paths."""

    model: Path
    rows: Path
    pad_id: int
    targets: tuple[str, ...]
    own_classes: bool
    steps: int
    warm_up: int
    samples: int = 16
    learning_rate: float = 1e-4
    seed: int = 0
    threads: int | None = None
    pythons: Mapping[str, str] = field(default_factory=lambda: {"own": sys.executable})

    @property
    def in_every_job(self) -> dict[str, Any]:
        names = ("pad_id", "own_classes", "steps", "warm_up", "samples", "learning_rate", "seed")
        paths = {"model": str(self.model), "rows": str(self.rows), "targets": list(self.targets)}
        return {**{name: getattr(self, name) for name in names}, **paths}


def run(contestant: Contestant, setting: Setting, dtype: str, **changes: Any) -> dict[str, Any]:
    """One contestant in a fresh process -> what it wrote.

    Raises: RuntimeError with the end of its output if it fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "out").mkdir()
        job = {
            **setting.in_every_job,
            "contestant": contestant.name,
            "output": str(folder / "out"),
            "result": str(folder / "result.json"),
            "started": time.time(),
            "dtype": dtype,
            "options": dict(contestant.options),
            **changes,
        }
        (folder / "job.json").write_text(json.dumps(job))
        python = setting.pythons[contestant.environment]
        command = [python, str(PEERS / contestant.script), str(folder / "job.json")]
        ended = subprocess.run(command, env=_environment(setting, folder), capture_output=True, text=True)
        if ended.returncode or not (folder / "result.json").exists():
            raise RuntimeError(f"{contestant.name} failed:\n{(ended.stdout + ended.stderr)[-3000:]}")
        result: dict[str, Any] = json.loads((folder / "result.json").read_text())
        return result


def _environment(setting: Setting, folder: Path) -> dict[str, str]:
    """No network, no cache from an earlier run, and the same number of threads for all."""
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    kept = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    threads = {} if setting.threads is None else {"OMP_NUM_THREADS": str(setting.threads)}
    return {**kept, **offline, **threads}
