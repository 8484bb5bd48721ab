"""Power cuts: what was not synced is lost, in whole or in part, after any number of a run's system calls."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from arena import Arena, changes_the_disk, durable_after, faults_at_rest
from disk_faults import Call, PowerCut

OUTCOMES = [("lost", 0), ("names", 0), *(("torn", seed) for seed in range(4))]


def cut_after_each(arena: Arena, calls: list[Call], *, resumed: bool) -> tuple[int, dict[str, list[str]]]:
    """How many states of the medium were judged, and those with faults."""
    durable = {step: durable_after(calls, step) for step in (2, 4)}
    trials, found = 0, {}
    after = [n for n, call in enumerate(calls, start=1) if changes_the_disk(call, syncs=True)]
    for count in [0, *after]:
        for outcome, seed in OUTCOMES:
            root = arena.new_dir()
            root.mkdir()
            PowerCut(calls[:count], arena.root, outcome, seed).write_out(root)
            run_dir = root / "recorded"
            at_least = max((step for step, nth in durable.items() if nth <= count), default=0)
            faults = (
                arena.faults(run_dir, at_least=at_least) if resumed else faults_at_rest(run_dir, at_least)
            )
            trials += 1
            if faults:
                found[f"{outcome} {seed} after {count} calls"] = faults
    return trials, found


def test_no_power_cut_loses_a_checkpoint(arena: Arena, figures: Callable[..., None]) -> None:
    before = len(arena.resumed)
    trials, found = cut_after_each(arena, arena.calls, resumed=True)
    assert found == {}
    assert trials >= 6 * 80
    figures("power_cuts", calls=len(arena.calls), states=trials, resumes=len(arena.resumed) - before)


@pytest.mark.parametrize(
    ("unsynced", "fault"),
    [("files", "is listed, but"), ("directories", "the newest checkpoint is of step 0, not 2")],
)
def test_the_harness_finds_what_is_not_synced(arena: Arena, unsynced: str, fault: str) -> None:
    """Negative control: the same protocol on a disk that forgets half of the syncs."""
    _, found = cut_after_each(arena, arena.record(unsynced=unsynced), resumed=False)
    assert any(fault in told for faults in found.values() for told in faults)


@pytest.mark.parametrize("outcome", ["lost", "names"])
def test_the_simulated_disk_knows_what_is_synced(arena: Arena, outcome: str) -> None:
    """A whole run, ended well: all of it is there, byte for byte, but for the removed lock."""
    root = arena.new_dir()
    root.mkdir()
    PowerCut(arena.calls, arena.root, outcome).write_out(root)
    for name in ("adapter_model.safetensors", "checkpoints/step-000004/optimizer.safetensors"):
        assert (root / "recorded" / name).read_bytes() == (arena.whole / name).read_bytes()
