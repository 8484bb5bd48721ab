"""A merge that is killed, refused or cut off: the target is not there, or whole; the next one cleans up."""

from __future__ import annotations

import errno
import fcntl
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from arena import Arena, distinct_kills
from disk_faults import Call
from test_refusing_disks import ERRNOS, faults_of_refusal

Figures = Callable[..., None]


def content(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def merged(arena: Arena) -> tuple[dict[str, bytes], list[Call]]:
    """What a merge gives, and its system calls."""
    target = arena.root / "merged" / "target"
    calls = arena.record(run_dir=arena.whole, target=target)
    return content(target), calls


def faults(arena: Arena, target: Path, expected: dict[str, bytes]) -> list[str]:
    found = []
    if target.exists() and content(target) != expected:
        found.append("half a model directory is there")
    if not target.exists():
        answer = arena.server.run("plain", run_dir=arena.whole, target=target)
        if answer["ended"] != "returned":
            found.append(f"the next merge: {answer['value']}")
        elif content(target) != expected:
            found.append("the next merge gives something else")
        if [path.name for path in target.parent.iterdir()] != [target.name]:
            found.append("something is left beside the target")
    return found


def test_a_kill_at_every_call(
    arena: Arena, merged: tuple[dict[str, bytes], list[Call]], figures: Figures
) -> None:
    expected, calls = merged
    assert len(calls) >= 25
    found = {}
    for nth in [*distinct_kills(calls, range(1, len(calls))), len(calls)]:
        target = arena.new_dir() / "target"
        answer = arena.server.run("killed_at", run_dir=arena.whole, target=target, nth=nth)
        assert answer["ended"] == "killed"
        found[nth] = faults(arena, target, expected)
    assert {nth: told for nth, told in found.items() if told} == {}
    figures("kill_sweep_of_a_merge", calls=len(calls), trials=len(found), survived=len(found))


@pytest.mark.parametrize("trials", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_kills_at_random_moments(
    arena: Arena, merged: tuple[dict[str, bytes], list[Call]], figures: Figures, trials: int
) -> None:
    """While transformers writes the shards, and while they are proved."""
    chance, kills = random.Random(0), 0
    target = arena.new_dir() / "target"
    seconds = arena.server.run("plain", run_dir=arena.whole, target=target)["seconds"]
    for _ in range(trials):
        target = arena.new_dir() / "target"
        moment = chance.uniform(0.1, 0.9) * seconds
        answer = arena.server.run("plain", kill_after=moment, run_dir=arena.whole, target=target)
        kills += answer["ended"] == "killed"
        assert faults(arena, target, merged[0]) == []
    assert kills >= trials // 2
    figures(f"random_kills_of_a_merge_{trials}", trials=trials, kills=kills, survived=trials)


@pytest.mark.slow
def test_every_call_may_fail(
    arena: Arena, merged: tuple[dict[str, bytes], list[Call]], figures: Figures
) -> None:
    expected, calls = merged
    found = {}
    for nth in range(1, len(calls) + 1):
        target = arena.new_dir() / "target"
        number = getattr(errno, ERRNOS[nth % len(ERRNOS)])
        answer = arena.server.run("failing_at", run_dir=arena.whole, target=target, nth=nth, number=number)
        found[nth] = faults_of_refusal(answer) + faults(arena, target, expected)
    assert {nth: told for nth, told in found.items() if told} == {}
    figures("errno_sweep_of_a_merge", trials=len(calls), survived=len(calls))


def test_every_file_is_synced_before_it_is_shown(merged: tuple[dict[str, bytes], list[Call]]) -> None:
    expected, calls = merged
    shown = next(n for n, call in enumerate(calls) if call[0] == "rename")
    open_paths: dict[int, str] = {}
    synced = set()
    for call, result, args in calls[:shown]:
        if call == "open":
            open_paths[result] = args[0]
        if call == "sync":
            synced.add(os.path.basename(open_paths[args[0]]))
    assert expected.keys() <= synced
    assert [call[0] for call in calls[shown + 1 :]] == ["open", "sync", "close"]


def test_a_real_refusal_in_the_shards_is_told(arena: Arena) -> None:
    """EFBIG inside safetensors, which tells it in words: exit code 7, and nothing is left."""
    target = arena.new_dir() / "target"
    answer = arena.server.run("limited", run_dir=arena.whole, target=target, limit="RLIMIT_FSIZE", value=8192)
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
