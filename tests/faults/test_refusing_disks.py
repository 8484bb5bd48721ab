"""Disks that refuse: an errno at every system call, real limits of the kernel, and too little room."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from arena import Arena, durable_after, names, save_and_retention

Figures = Callable[..., None]
ERRNOS = ("ENOSPC", "EDQUOT", "EIO", "EROFS", "EACCES", "EMFILE", "ENAMETOOLONG")


def fail_at_each(arena: Arena, calls: Iterable[int], first: int) -> dict[str, list[str]]:
    """Each call with the next errno; every other disk goes on failing."""
    found = {}
    for place, nth in enumerate(calls, start=first):
        name, lasting = ERRNOS[place % len(ERRNOS)], place % 2 == 1
        run_dir = arena.new_dir()
        number = getattr(errno, name)
        answer = arena.server.run("failing_at", run_dir=run_dir, nth=nth, number=number, lasting=lasting)
        at_least = max((step for step in (2, 4) if durable_after(arena.calls, step) < nth), default=0)
        faults = faults_of_refusal(answer)
        if not lasting and any(".tmp-" in name for name in names(run_dir)):
            faults.append("a half-written file is left")
        faults += arena.faults(run_dir, at_least=at_least)
        found[f"{name} at call {nth}, lasting {lasting}"] = faults
    return found


def faults_of_refusal(answer: dict[str, Any]) -> list[str]:
    """A refusal is told with exit code 7, place and remedy; one that harms nothing may pass in silence."""
    if answer["ended"] == "returned":
        return [] if answer["value"] else ["the fault never came"]
    kind, text, code = answer["value"]
    told = kind == "StorageError" and code == 7 and "where: /" in text and "why:" in text and "do: " in text
    return [] if told else [f"told as {kind}: {text}"]


@pytest.mark.slow
def test_two_of_three_calls_of_a_save_and_a_retention_may_fail(arena: Arena, figures: Figures) -> None:
    calls = save_and_retention(arena.calls)
    found = fail_at_each(arena, [n for n in calls if n % 3 != 1], first=0)
    assert len(found) >= 24
    assert {trial: faults for trial, faults in found.items() if faults} == {}
    figures("errno_sweep_of_a_save_and_a_retention", calls=len(calls), trials=len(found), survived=len(found))


@pytest.mark.slow
def test_every_call_of_a_run_may_fail(arena: Arena, figures: Figures) -> None:
    every = range(1, len(arena.calls) + 1)
    found = {
        trial: faults for first in range(4) for trial, faults in fail_at_each(arena, every, first).items()
    }
    assert len(found) >= 4 * 120
    assert {trial: faults for trial, faults in found.items() if faults} == {}
    figures("errno_sweep_of_a_run", trials=len(found), survived=len(found))


@pytest.mark.slow
def test_every_call_of_a_resume_may_fail(arena: Arena, figures: Figures) -> None:
    """From a directory with a checkpoint and the remains of a kill; nothing that was safe before is lost."""
    cut = arena.cut_in_a_save(arena.root / "cut")
    found: dict[str, list[str]] = {}
    for nth in itertools.count(1):
        name, lasting, run_dir = ERRNOS[nth % len(ERRNOS)], nth % 2 == 1, arena.copy_of(cut)
        args = {"nth": nth, "number": getattr(errno, name), "lasting": lasting, "resume": True}
        answer = arena.server.run("failing_at", run_dir=run_dir, **args)
        if answer["ended"] == "returned" and answer["value"] is False:
            break
        faults = faults_of_refusal(answer) + arena.faults(run_dir, at_least=2)
        found[f"{name} at call {nth}, lasting {lasting}"] = faults
    assert len(found) > 80
    assert {trial: faults for trial, faults in found.items() if faults} == {}
    figures("errno_sweep_of_a_resume", trials=len(found), survived=len(found))


@pytest.mark.parametrize("resume", [False, True], ids=["run", "resume"])
def test_a_limit_of_file_sizes_is_told(arena: Arena, resume: bool) -> None:
    """A real refusal of the kernel, in the middle of a write: EFBIG."""
    run_dir = arena.new_dir()
    if resume:
        arena.cut_in_a_save(run_dir)
    answer = arena.server.run("limited", run_dir=run_dir, limit="RLIMIT_FSIZE", value=8192, resume=resume)
    kind, text, code = answer["value"]
    assert (kind, code) == ("StorageError", 7)
    assert "optimizer.safetensors" in text
    assert "File too large" in text
    assert "ulimit -f" in text
    assert arena.faults(run_dir, at_least=2 if resume else 0) == []


def test_no_run_begins_without_the_room_it_needs(arena: Arena) -> None:
    run_dir = arena.new_dir()
    answer = arena.server.run("small_disk", run_dir=run_dir, free=1_000_000, generous=0)
    kind, text, code = answer["value"]
    assert (kind, code) == ("StorageError", 7)
    assert f"where: {run_dir}" in text
    assert "2.1 MB needed, 1.0 MB free" in text
    assert "make room" in text
    assert names(run_dir) == set()


def test_no_save_begins_without_the_room_it_needs(arena: Arena) -> None:
    """Full before the second save: the first checkpoint stands, and nothing of the second is there."""
    run_dir = arena.new_dir()
    answer = arena.server.run("small_disk", run_dir=run_dir, free=5_000, generous=2)
    kind, text, code = answer["value"]
    assert (kind, code) == ("StorageError", 7)
    assert "not enough room for step-000004" in text
    assert " bytes needed, 5,000 bytes free" in text
    assert {name for name in names(run_dir) if "step-000004" in name} == set()
    assert arena.faults(run_dir, at_least=2) == []


def test_the_harness_finds_an_errno_that_nobody_tells(arena: Arena) -> None:
    """Negative control: answers that are no refusal in our words."""
    assert faults_of_refusal({"ended": "raised", "value": ["OSError", "[Errno 28] No space left", None]})
    assert faults_of_refusal({"ended": "killed", "value": ["", "", None]})
    assert faults_of_refusal({"ended": "returned", "value": False})
