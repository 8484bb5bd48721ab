"""No home, no place for temporary files, a deleted working directory, a directory of somebody else's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from arena import Arena

import lorasmith as ls
from lorasmith.cli import main as command_line
from lorasmith.files.adapter_dir import ADAPTER_WEIGHTS

ASSETS = Path(ls.__file__).parent / "assets"
HOMES = {
    "none": {},
    "that nobody can make": {"HOME": "/proc/nowhere", "TMPDIR": "/proc/nowhere"},
    "a file": {"HOME": "/dev/null", "TMPDIR": "/dev/null"},
}


def environment(home: str) -> dict[str, str]:
    places = ("HOME", "TMPDIR", "LORASMITH_CACHE", "XDG_CACHE_HOME", "HF_HOME", "MPLCONFIGDIR")
    return {key: value for key, value in os.environ.items() if key not in places} | HOMES[home]


@pytest.mark.slow
@pytest.mark.parametrize("home", HOMES)
def test_a_run_needs_no_home(tmp_path: Path, home: str) -> None:
    rows = tmp_path / "rows.jsonl"  # enough of them that the cache would keep them
    rows.write_text((ASSETS / "persona.jsonl").read_text(encoding="utf-8") * 3, encoding="utf-8")
    arguments = ["--model", str(ASSETS / "tiny"), "--data", str(rows), "-o", str(tmp_path / "run")]
    steps = ["--set", "train.max_steps=1", "--set", "train.batch_size=2"]
    told = subprocess.run(
        [sys.executable, "-m", "lorasmith", "train", *arguments, *steps],
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert told.returncode == 0, told.stderr
    assert "Traceback" not in told.stderr
    assert (tmp_path / "run" / ADAPTER_WEIGHTS).is_file()


def test_a_deleted_working_directory_is_named(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """Before torch is loaded: from nowhere it cannot be, and ends the process."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setenv("PWD", str(gone))
    monkeypatch.setattr("sys.argv", ["lorasmith", "doctor"])
    with pytest.raises(SystemExit) as caught:
        command_line.main()
    told = capsys.readouterr().err
    assert caught.value.code == 4
    assert told.startswith("error: the working directory was deleted")
    assert str(gone) in told
    assert "do:" in told


def test_a_run_whose_working_directory_goes_ends_as_any_other(arena: Arena) -> None:
    run_dir = arena.new_dir()
    answer = arena.server.run("from_nowhere", run_dir=run_dir)
    assert answer["ended"] == "returned", answer
    assert (run_dir / ADAPTER_WEIGHTS).read_bytes() == (arena.whole / ADAPTER_WEIGHTS).read_bytes()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_model_that_is_only_readable_is_enough(arena: Arena) -> None:
    """A user who owns neither the base nor its directory trains, and merges, where he may write."""
    arena.root.chmod(0o711)
    for path in (arena.root / "base").iterdir():
        path.chmod(0o444)
    room = arena.new_dir()
    room.mkdir()
    room.chmod(0o777)
    where = {"run_dir": room / "run", "base": arena.root / "base"}
    assert arena.server.run("as_nobody", **where)["ended"] == "returned"
    merged = arena.server.run("as_nobody", **where, target=room / "merged")
    assert merged["ended"] == "returned", merged
    assert (room / "run" / ADAPTER_WEIGHTS).read_bytes() == (arena.whole / ADAPTER_WEIGHTS).read_bytes()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("target", [None, "merged"])
def test_a_directory_that_is_not_ours_to_write_is_named(arena: Arena, target: str | None) -> None:
    arena.root.chmod(0o711)
    room = arena.new_dir()
    room.mkdir()
    room.chmod(0o755)
    run_dir = room / "run" if target is None else arena.whole
    where = {"base": arena.root / "base"} | ({} if target is None else {"target": room / target})
    kind, told, code = arena.server.run("as_nobody", run_dir=run_dir, **where)["value"]
    assert (kind, code) == ("StorageError", 7)
    assert str(room) in told
    assert "Permission denied" in told
    assert "get the right to write there" in told
    assert list(room.iterdir()) == []
