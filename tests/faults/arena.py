"""Where trials run and are judged: what a run directory must hold after a fault, and after the resume."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from disk_faults import Call
from fork_server import ForkServer

from lorasmith.files.adapter_dir import ADAPTER_WEIGHTS
from lorasmith.runs.manifest import damage, list_checkpoints, newest_checkpoint
from lorasmith.runs.metrics import read_metrics
from lorasmith.runs.run_dir import is_run_dir

_HIDDEN = (".tmp-", ".trash-")


@dataclass
class Arena:
    """A fork server, a directory for trials, and the uninterrupted run that all others must equal."""

    server: ForkServer
    root: Path
    count: int = 0
    resumed: dict[str, list[str]] = field(default_factory=dict)
    """Faults found by resuming from a directory with this visible content."""

    @cached_property
    def whole(self) -> Path:
        path = self.root / "whole"
        assert self.server.run("plain", run_dir=path)["ended"] == "returned"
        return path

    @cached_property
    def two_checkpoints(self) -> Path:
        """A run that was killed when steps 2 and 4 both had a checkpoint."""
        path = self.root / "two"
        nth = calls_about(self.calls, ".trash-step-000002")[0]
        assert self.server.run("killed_at", run_dir=path, nth=nth)["ended"] == "killed"
        assert [p.name for p in list_checkpoints(path)] == ["step-000002", "step-000004"]
        return path

    def cut_in_a_save(self, path: Path) -> Path:
        """A run that was killed in its second save: a checkpoint, and the remains of another."""
        nth = save_and_retention(self.calls)[20]
        assert self.server.run("killed_at", run_dir=path, nth=nth)["ended"] == "killed"
        return path

    def copy_of(self, source: Path) -> Path:
        return shutil.copytree(source, self.new_dir())

    @cached_property
    def calls(self) -> list[Call]:
        """The system calls of the uninterrupted run, in `self.root / "recorded"`."""
        return self.record()

    def record(self, **changes: Any) -> list[Call]:
        calls_file = self.root / "calls"
        args = {"run_dir": self.root / "recorded", "calls_file": calls_file, **changes}
        answer = self.server.run("recorded", **args)
        assert answer["ended"] == "returned", answer
        shutil.rmtree(self.root / "recorded", ignore_errors=True)
        return pickle.loads(calls_file.read_bytes())

    def new_dir(self) -> Path:
        """The last one goes: trials are many."""
        shutil.rmtree(self.root / f"run-{self.count}", ignore_errors=True)
        self.count += 1
        return self.root / f"run-{self.count}"

    def faults(self, run_dir: Path, *, at_least: int = 0, resume_all: bool = False) -> list[str]:
        """What is wrong with a directory after a fault. None of its checkpoints may be damaged, the newest is
        of step `at_least` or later, and a resume from it ends as the uninterrupted run."""
        found = faults_at_rest(run_dir, at_least)
        state = visible_content(run_dir)
        if resume_all or state not in self.resumed:
            self.resumed[state] = self.faults_of_resume(run_dir)
        return found + self.resumed[state]

    def faults_of_resume(self, run_dir: Path, task: str = "plain") -> list[str]:
        answer = self.server.run(task, run_dir=run_dir, resume=is_run_dir(run_dir))
        if answer["ended"] != "returned":
            return [f"the resume ended so: {answer['ended']} {answer['value']}"]
        found = []
        if (run_dir / ADAPTER_WEIGHTS).read_bytes() != (self.whole / ADAPTER_WEIGHTS).read_bytes():
            found.append("the adapter differs from that of the uninterrupted run")
        if losses(run_dir) != losses(self.whole):
            found.append(f"metrics.jsonl differs: {losses(run_dir)}, not {losses(self.whole)}")
        differing = names(run_dir) ^ names(self.whole)
        if any("/step-000002" not in name for name in differing):  # a run cut off before its last retention
            found.append(f"files differ: {sorted(differing)}")
        return found


def faults_at_rest(run_dir: Path, at_least: int) -> list[str]:
    found = [f"{p.name} is listed, but {damage(p)}" for p in list_checkpoints(run_dir) if damage(p)]
    newest, _ = newest_checkpoint(run_dir)
    step = int(newest.name.removeprefix("step-")) if newest else 0
    return found + ([f"the newest checkpoint is of step {step}, not {at_least}"] if step < at_least else [])


def losses(run_dir: Path) -> list[tuple[Any, ...]]:
    """What of metrics.jsonl does not depend on the speed of the machine."""
    return [(m["step"], m["loss"], m["grad_norm"], m["num_targets"]) for m in read_metrics(run_dir)]


def names(run_dir: Path) -> set[str]:
    return {str(path.relative_to(run_dir)) for path in run_dir.rglob("*")}


def visible_content(run_dir: Path) -> str:
    """A digest of all that is not hidden; speeds, times and paths count for nothing."""
    digest = hashlib.sha256(json.dumps(losses(run_dir)).encode())
    for name in sorted(names(run_dir)):
        path = run_dir / name
        told_elsewhere = name in ("metrics.jsonl", "run.lock", "config.yaml")
        if any(part.startswith(_HIDDEN) for part in Path(name).parts):
            continue
        digest.update(name.encode())
        if path.is_file() and not told_elsewhere:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def calls_about(calls: list[Call], part: str) -> list[int]:
    """The numbers, from 1, of the calls that name a path with `part` in it."""
    return [n for n, call in enumerate(calls, start=1) if any(part in str(a) for a in call[2])]


def durable_after(calls: list[Call], step: int) -> int:
    """The number of the call after which a checkpoint must last: the sync that follows its one rename."""
    shown = next(
        n
        for n, (name, _, args) in enumerate(calls, start=1)
        if name == "rename" and args[1].endswith(f"/step-{step:06d}")
    )
    return shown + next(n for n, call in enumerate(calls[shown:], start=1) if call[0] == "close")


def distinct_kills(calls: list[Call], numbers: range) -> list[int]:
    """Of the calls to be killed at, those that find the disk other than the call before did."""
    return [
        n
        for n in numbers
        if n == numbers[0] or calls[n - 1][0] == "write" or changes_the_disk(calls[n - 2], syncs=False)
    ]


def changes_the_disk(call: Call, *, syncs: bool) -> bool:
    """`syncs`: whether what would survive a power cut counts too."""
    name, _, args = call
    if name == "open":
        return bool(args[1] & os.O_CREAT)
    return name not in ("close", "free_bytes", "lock") and (syncs or name != "sync")


def save_and_retention(calls: list[Call]) -> range:
    """The calls of the second save, which also deletes the first checkpoint."""
    first = calls_about(calls, ".tmp-step-000004")[0] - 1  # the question for free space comes before
    return range(first, calls_about(calls, ".trash-step-000002")[-1] + 1)
