"""Merges and conversions that are killed or refused: the target is whole or not there; the next cleans up."""

from __future__ import annotations

import errno
import fcntl
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from adapters import write_adapter
from arena import Arena, distinct_kills
from disk_faults import Call
from modules import save_tiny
from test_refusing_disks import ERRNOS, faults_of_refusal

Figures = Callable[..., None]


@dataclass(frozen=True)
class Export:
    """A way out, what it gives, and its system calls."""

    name: str
    what: dict[str, Any]
    expected: dict[str, bytes]
    calls: list[Call]

    def faults(self, arena: Arena, target: Path) -> list[str]:
        found = []
        if target.exists() and content(target) != self.expected:
            found.append("half of what it gives is there")
        if not target.exists():
            answer = arena.server.run("plain", target=target, **self.what)
            if answer["ended"] != "returned":
                found.append(f"the next {self.name}: {answer['value']}")
            elif content(target) != self.expected:
                found.append(f"the next {self.name} gives something else")
            if [path.name for path in target.parent.iterdir()] != [target.name]:
                found.append("something is left beside the target")
        return found


def content(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter over Baichuan2's W_pack."""
    root = tmp_path_factory.mktemp("fused")
    return write_adapter(save_tiny("baichuan2", root / "base"), root / "adapter", ["W_pack", "o_proj"])


@pytest.fixture(scope="module", params=["merge", "conversion"])
def export(request: pytest.FixtureRequest, arena: Arena, fused: Path) -> Export:
    is_merge = request.param == "merge"
    what: dict[str, Any] = {"run_dir": arena.whole} if is_merge else {"run_dir": fused, "to": "split"}
    target = arena.root / request.param / "target"
    calls = arena.record(target=target, **what)
    assert len(calls) >= (25 if is_merge else 12)
    return Export(request.param, what, content(target), calls)


def test_a_kill_at_every_call(arena: Arena, export: Export, figures: Figures) -> None:
    calls, found = export.calls, {}
    for nth in [*distinct_kills(calls, range(1, len(calls))), len(calls)]:
        target = arena.new_dir() / "target"
        answer = arena.server.run("killed_at", target=target, nth=nth, **export.what)
        assert answer["ended"] == "killed"
        found[nth] = export.faults(arena, target)
    assert {nth: told for nth, told in found.items() if told} == {}
    figures(f"kill_sweep_of_a_{export.name}", calls=len(calls), trials=len(found), survived=len(found))


@pytest.mark.parametrize("export", ["merge"], indirect=True)
@pytest.mark.parametrize("trials", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_kills_at_random_moments(arena: Arena, export: Export, figures: Figures, trials: int) -> None:
    """While transformers writes the shards, and while they are proved."""
    chance, kills = random.Random(0), 0
    target = arena.new_dir() / "target"
    seconds = arena.server.run("plain", target=target, **export.what)["seconds"]
    for _ in range(trials):
        target = arena.new_dir() / "target"
        moment = chance.uniform(0.1, 0.9) * seconds
        answer = arena.server.run("plain", kill_after=moment, target=target, **export.what)
        kills += answer["ended"] == "killed"
        assert export.faults(arena, target) == []
    assert kills >= trials // 2
    figures(f"random_kills_of_a_merge_{trials}", trials=trials, kills=kills, survived=trials)


@pytest.mark.slow
def test_every_call_may_fail(arena: Arena, export: Export, figures: Figures) -> None:
    found = {}
    for nth in range(1, len(export.calls) + 1):
        target = arena.new_dir() / "target"
        number = getattr(errno, ERRNOS[nth % len(ERRNOS)])
        answer = arena.server.run("failing_at", target=target, nth=nth, number=number, **export.what)
        found[nth] = faults_of_refusal(answer) + export.faults(arena, target)
    assert {nth: told for nth, told in found.items() if told} == {}
    figures(f"errno_sweep_of_a_{export.name}", trials=len(found), survived=len(found))


def test_every_file_is_synced_before_it_is_shown(export: Export) -> None:
    shown = next(n for n, call in enumerate(export.calls) if call[0] == "rename")
    open_paths: dict[int, str] = {}
    synced = set()
    for call, result, args in export.calls[:shown]:
        if call == "open":
            open_paths[result] = args[0]
        if call == "sync":
            synced.add(os.path.basename(open_paths[args[0]]))
    assert export.expected.keys() <= synced
    assert [call[0] for call in export.calls[shown + 1 :]] == ["open", "sync", "close"]


def test_a_real_refusal_in_the_weights_is_told(arena: Arena, export: Export) -> None:
    """EFBIG, in a merge inside safetensors, which tells it in words: exit code 7, and nothing is left."""
    target = arena.new_dir() / "target"
    answer = arena.server.run("limited", target=target, limit="RLIMIT_FSIZE", value=8192, **export.what)
    kind, text, code = answer["value"]
    assert (kind, code) == ("StorageError", 7), text
    assert "File too large" in text
    assert list(target.parent.iterdir()) == []


def test_another_merge_under_way_is_not_swept(arena: Arena) -> None:
    """Its directory is locked; an abandoned one, and only one of ours, goes."""
    target = arena.new_dir() / "target"
    living, dead, other = (
        target.with_name(f".tmp-{name}") for name in ("target-00000001", "target-00000002", "x")
    )
    for path in (living, dead, other):
        path.mkdir(parents=True)
        (path / "weights").write_text("0")
    descriptor = os.open(living, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert arena.server.run("plain", run_dir=arena.whole, target=target)["ended"] == "returned"
    os.close(descriptor)
    assert (living.exists(), dead.exists(), other.exists()) == (True, False, True)
