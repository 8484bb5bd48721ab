"""A disk that is really full or read-only: told, nothing lost, the same bytes once it is mended."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from adapters import write_adapter
from arena import Arena, calls_about, save_and_retention
from modules import save_tiny

import lorasmith as ls

Figures = Callable[..., None]
REASON = {"full": "No space left on device", "read_only": "Read-only file system"}
TROUBLES = pytest.mark.parametrize("trouble", REASON)


@pytest.fixture(scope="module", autouse=True)
def mounts(arena: Arena) -> None:
    reason = arena.server.run("why_no_mounts")["value"]
    if reason:
        pytest.skip(f"no mounts for tests here, neither as root nor in a user namespace: {reason}")


def refuse(arena: Arena, trouble: str, action: str, nths: Iterable[int], **where: Any) -> dict[int, Any]:
    """What was told at each call, once nothing was lost and the second try gave the same bytes."""
    told, faults = {}, {}
    for nth in nths:
        mount = arena.root / "mount"
        answer = arena.server.run("refused", mount=mount, trouble=trouble, nth=nth, action=action, **where)
        assert answer["ended"] == "returned", answer
        told[nth], found = answer["value"]["told"], answer["value"]["faults"]
        faults[nth] = found + faults_of_telling(told[nth], trouble)
    assert {nth: found for nth, found in faults.items() if found} == {}
    return told


def faults_of_telling(told: list[Any] | None, trouble: str) -> list[str]:
    """None was told where the rest of the calls needs no room."""
    if told is None:
        return []
    text, code = told
    why = REASON[trouble] in text or ("there is not enough room" in text and trouble == "full")
    room = " free" in text or trouble != "full"
    whole = code == 7 and why and room and "where: /" in text and "do: " in text
    return [] if whole else [f"told so, with code {code}: {text}"]


@TROUBLES
def test_a_run(arena: Arena, trouble: str) -> None:
    """Before the first call; when room is asked for; within the second save; at the final adapter."""
    asked = [n for n, call in enumerate(arena.calls, start=1) if call[0] == "free_bytes"]
    writes = [n for n in save_and_retention(arena.calls) if arena.calls[n - 1][0] == "write"]
    last = calls_about(arena.calls, "/.tmp-adapter_model")[0]
    told = refuse(arena, trouble, "run", [1, *asked, writes[1], last], whole=arena.whole)
    assert all(told.values())
    if trouble == "full":
        assert "2.1 MB needed, 0 bytes free" in told[asked[0]][0]
        assert "not enough room for step-000004" in told[asked[-1]][0]
        assert " bytes needed, 0 bytes free" in told[writes[1]][0]


@TROUBLES
@pytest.mark.slow
def test_a_resume(arena: Arena, trouble: str) -> None:
    where = {"whole": arena.whole, "source": arena.two_checkpoints}
    told = refuse(arena, trouble, "resume", [1, 8, 16], **where)
    assert any(told.values())


@TROUBLES
@pytest.mark.slow
def test_a_merge(arena: Arena, trouble: str) -> None:
    merged = arena.new_dir() / "merged"
    merged.parent.mkdir()  # as on the small disk, so that calls have the same numbers
    calls = arena.record(run_dir=arena.whole, target=merged)
    room = next(n for n, call in enumerate(calls, start=1) if call[0] == "free_bytes")
    nths = [1, room, room + 1, room + 3]
    told = refuse(arena, trouble, "merge", nths, whole=merged, source=arena.whole)
    assert all(told[nth] for nth in nths[1:3])


@TROUBLES
@pytest.mark.slow
def test_a_conversion(arena: Arena, trouble: str) -> None:
    base = arena.root / "baichuan2"
    if not base.exists():
        write_adapter(save_tiny("baichuan2", base), arena.root / "fused", ["W_pack"])
        ls.convert_adapter(arena.root / "fused", to="split", output_dir=arena.root / "split")
    where = {"whole": arena.root / "split", "source": arena.root / "fused"}
    told = refuse(arena, trouble, "convert", range(1, 12), **where)
    assert len([one for one in told.values() if one]) >= 6


@pytest.mark.slow
@TROUBLES
def test_every_call_of_a_run(arena: Arena, figures: Figures, trouble: str) -> None:
    told = refuse(arena, trouble, "run", range(1, len(arena.calls) + 1), whole=arena.whole)
    assert len(told) >= 120
    assert len([one for one in told.values() if one]) >= 60
    figures(f"real_{trouble}_disk_at_each_call_of_a_run", calls=len(told), survived=len(told))


def test_the_harness_finds_an_error_that_is_not_told() -> None:
    """Negative control: another code, another reason, no room named."""
    whole = (
        "cannot write x\n  where: /x\n  why: No space left on device (3 bytes needed, 0 bytes free)\n  do: y"
    )
    assert faults_of_telling([whole, 7], "full") == []
    assert faults_of_telling([whole, 1], "full")
    assert faults_of_telling([whole, 7], "read_only")
    assert faults_of_telling([whole.replace(" free", ""), 7], "full")


def test_nothing_of_the_mounts_is_left(arena: Arena) -> None:
    refuse(arena, "full", "run", [1], whole=arena.whole)
    assert str(arena.root) not in Path("/proc/self/mounts").read_text()
    assert list((arena.root / "mount").iterdir()) == []
