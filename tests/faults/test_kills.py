"""SIGKILL at every system call of a run, and at random moments: nothing is lost, and nothing differs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from arena import Arena, calls_about, distinct_kills, durable_after, faults_at_rest, save_and_retention

from lorasmith.files.adapter_dir import ADAPTER_WEIGHTS
from lorasmith.runs.metrics import read_metrics
from lorasmith.runs.run_dir import is_run_dir

Figures = Callable[..., None]


def kill_at_each(arena: Arena, calls: Iterable[int], *, resume_all: bool) -> dict[int, list[str]]:
    found = {}
    for nth in calls:
        run_dir = arena.new_dir()
        answer = arena.server.run("killed_at", run_dir=run_dir, nth=nth)
        assert answer["ended"] == "killed", answer
        at_least = max((step for step in (2, 4) if durable_after(arena.calls, step) < nth), default=0)
        found[nth] = arena.faults(run_dir, at_least=at_least, resume_all=resume_all)
    return found


def test_a_kill_at_every_call_of_a_save_and_a_retention(arena: Arena, figures: Figures) -> None:
    calls = save_and_retention(arena.calls)
    assert len(calls) >= 35
    found = kill_at_each(arena, distinct_kills(arena.calls, calls), resume_all=False)
    assert len(found) >= 18
    assert {nth: faults for nth, faults in found.items() if faults} == {}
    figures("kill_sweep_of_a_save_and_a_retention", calls=len(calls), trials=len(found), survived=len(found))


@pytest.mark.slow
def test_a_kill_at_every_call_of_a_run(arena: Arena, figures: Figures) -> None:
    found = kill_at_each(arena, range(1, len(arena.calls) + 1), resume_all=True)
    assert len(found) >= 120
    assert {nth: faults for nth, faults in found.items() if faults} == {}
    assert arena.server.run("killed_at", run_dir=arena.new_dir(), nth=len(found) + 1)["ended"] == "returned"
    figures("kill_sweep_of_a_run", calls=len(found), survived=len(found))


@pytest.mark.slow
def test_a_kill_at_every_call_of_a_resume(arena: Arena, figures: Figures) -> None:
    """From a directory with a checkpoint, a damaged one and the remains of a kill."""
    nth, faults, cut = 0, {}, arena.cut_in_a_save(arena.root / "cut")
    while True:
        nth += 1
        run_dir = arena.copy_of(cut)
        answer = arena.server.run("killed_at", run_dir=run_dir, nth=nth, resume=True)
        if answer["ended"] == "returned":
            break
        faults[nth] = arena.faults(run_dir, at_least=2, resume_all=True)
    assert nth > 80
    assert {nth: found for nth, found in faults.items() if found} == {}
    figures("kill_sweep_of_a_resume", calls=nth - 1, survived=nth - 1)


def kill_at_random(arena: Arena, trials: int, seed: int) -> tuple[int, list[list[str]]]:
    """Each run is killed once, every third twice. The kills that hit, and the faults of each trial."""
    chance = random.Random(seed)
    seconds = min(arena.server.run("plain", run_dir=arena.new_dir())["seconds"] for _ in range(3))
    kills, faults = 0, []
    for trial in range(trials):
        run_dir = arena.new_dir()
        for resume in [False, True][: 2 if trial % 3 == 2 else 1]:
            moment = chance.uniform(0.1, 1.0) * seconds
            answer = arena.server.run(
                "plain", kill_after=moment, run_dir=run_dir, resume=resume and is_run_dir(run_dir)
            )
            assert answer["ended"] in ("killed", "returned"), answer
            kills += answer["ended"] == "killed"
        faults.append(arena.faults(run_dir, resume_all=True))
    return kills, faults


@pytest.mark.parametrize(
    ("trials", "seed"), [(30, 0), pytest.param(300, 1, marks=pytest.mark.slow)], ids=["30", "300"]
)
def test_kills_at_random_moments(arena: Arena, figures: Figures, trials: int, seed: int) -> None:
    kills, faults = kill_at_random(arena, trials, seed)
    assert [found for found in faults if found] == []
    assert kills >= trials * 2 // 3, "too few kills hit a living run to prove anything"
    figures(f"random_kills_{trials}", trials=trials, kills=kills, survived=trials)


@pytest.mark.parametrize(
    ("protocol", "part"),
    [("written_in_place", "/step-000004/"), ("deleted_in_place", "/step-000002/")],
)
def test_the_harness_finds_a_protocol_without_renames(arena: Arena, protocol: str, part: str) -> None:
    """Negative control: checkpoints written, or deleted, under their own name."""
    calls = arena.record(protocol=protocol)
    found = []
    for nth in calls_about(calls, part)[1:-1:4]:
        run_dir = arena.new_dir()
        answer = arena.server.run("killed_at", run_dir=run_dir, nth=nth, protocol=protocol)
        assert answer["ended"] == "killed"
        found += faults_at_rest(run_dir, 0)
    assert any("is listed, but" in fault for fault in found), found


@pytest.mark.parametrize("nth", range(1, 6), ids=lambda nth: f"evaluation {nth}")
def test_a_kill_in_an_evaluation_costs_nothing(arena: Arena, nth: int) -> None:
    """Its loss, the best step and the adapter are those of the run that nobody killed."""
    whole, run_dir = arena.root / "evaluated", arena.new_dir()
    if not whole.exists():
        assert arena.server.run("evaluated", run_dir=whole)["ended"] == "returned"
    assert arena.server.run("evaluated", run_dir=run_dir, nth=nth)["ended"] == "killed"
    assert faults_at_rest(run_dir, at_least=0) == []
    answer = arena.server.run("evaluated", run_dir=run_dir, resume=is_run_dir(run_dir))
    assert answer["ended"] == "returned", answer
    assert scores(run_dir) == scores(whole)
    assert (run_dir / ADAPTER_WEIGHTS).read_bytes() == (whole / ADAPTER_WEIGHTS).read_bytes()


def scores(run_dir: Path) -> list[tuple[object, ...]]:
    return [(line["step"], line.get("loss"), line.get("eval_loss")) for line in read_metrics(run_dir)]
