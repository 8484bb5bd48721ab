"""Two runs on one directory: the second is refused at once, and a dead owner keeps nobody out."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from arena import Arena

from lorasmith.errors import ConfigError, SetupError, StorageError
from lorasmith.runs.lock import LOCK_FILE, run_lock
from lorasmith.runs.progress import SilentReporter
from lorasmith.runs.run_dir import adapter_of
from lorasmith.storage import Disk, Storage

OWNER = """
import sys
from pathlib import Path
from lorasmith.storage import Storage
from lorasmith.runs.lock import run_lock
from lorasmith.runs.progress import SilentReporter
with run_lock(Storage(), Path(sys.argv[1]), SilentReporter()):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def owner(run_dir: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", OWNER, str(run_dir)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def take(run_dir: Path, disk: Disk | None = None) -> None:
    with run_lock(Storage(disk), run_dir, SilentReporter()):
        assert (run_dir / LOCK_FILE).exists()


def test_the_second_is_told_who_holds_it_until_that_one_dies(tmp_path: Path) -> None:
    with owner(tmp_path) as process:
        for number in (signal.SIGCONT, signal.SIGSTOP):
            os.kill(process.pid, number)
            with pytest.raises(SetupError, match="another run is writing in this directory") as caught:
                take(tmp_path)
            assert f"process {process.pid} on {socket.gethostname()}, since 20" in str(caught.value)
            assert f"where: {tmp_path}" in str(caught.value)
            assert "or choose another train.output_dir" in str(caught.value)
            assert caught.value.exit_code == 4
        process.kill()
        process.wait()
        assert (tmp_path / LOCK_FILE).exists(), "what it said is left, and harmless"
        take(tmp_path)
        assert not (tmp_path / LOCK_FILE).exists()


def test_the_command_line_tells_it_before_it_looks_at_a_model(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lorasmith", "train", "--model", "nowhere", "--data", "nothing.jsonl"]
    with owner(tmp_path) as process:
        done = subprocess.run([*command, "--output-dir", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 4
    assert done.stderr.startswith("error: another run is writing in this directory\n")
    assert f"process {process.pid} on" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_process_of_a_launcher_refuses_before_anything_is_written(tmp_path: Path) -> None:
    train = ["-m", "lorasmith", "train", "--model", "nowhere", "--data", "none.jsonl", "--output-dir", "run"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
    done = subprocess.run([*launcher, *train], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode != 0
    assert "error: started as one of 2 processes, and a run is one process on one device\n" in done.stderr
    assert "  do:    start it without the launcher" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("launched", "refused"), [("2", True), ("1", False), ("", False), ("many", False)])
def test_a_program_of_its_own_is_refused_as_a_rank_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launched: str, refused: bool
) -> None:
    monkeypatch.setenv("WORLD_SIZE", launched)
    if refused:
        with pytest.raises(SetupError, match="started as one of 2 processes"):
            take(tmp_path)
    else:
        take(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_it_is_given_back_with_every_error(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), run_lock(Storage(), tmp_path, SilentReporter()):
        raise KeyboardInterrupt
    take(tmp_path)


@pytest.mark.parametrize("content", [b"", b"garbage", b"{}", b'{"pid": "x"}', b"\xff" * 9000])
def test_stale_content_is_harmless(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LOCK_FILE).write_bytes(content)
    take(tmp_path)


def test_a_link_or_a_pipe_in_its_place_is_refused(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    (tmp_path / LOCK_FILE).symlink_to(victim)
    with pytest.raises(StorageError, match=LOCK_FILE):
        take(tmp_path)
    assert victim.read_text() == "untouched"
    (tmp_path / LOCK_FILE).unlink()
    os.mkfifo(tmp_path / LOCK_FILE)
    with pytest.raises(StorageError, match="not a regular file"):
        take(tmp_path)


def test_a_file_is_no_run_directory(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        take(tmp_path / "run")


def test_a_file_system_without_locks_is_told(tmp_path: Path) -> None:
    class NoLocks(Disk):
        def lock(self, descriptor):
            raise OSError(37, "No locks available")

    class Told(SilentReporter):
        def note(self, text):
            notes.append(text)

    notes: list[str] = []
    with run_lock(Storage(NoLocks()), tmp_path, Told()):
        pass
    assert notes == [f"no locks on this file system: nothing keeps a second run out of {tmp_path}"]


def test_a_run_holds_it_and_a_reader_needs_none(arena: Arena) -> None:
    run_dir = arena.copy_of(arena.two_checkpoints)
    with run_lock(Storage(), run_dir, SilentReporter()):
        before = sorted(run_dir.rglob("*"))
        for resume in (False, True):
            answer = arena.server.run("plain", run_dir=run_dir, resume=resume)
            assert answer["value"][0] == "SetupError"
            assert f"process {os.getpid()} on" in answer["value"][1]
        assert sorted(run_dir.rglob("*")) == before, "refused before anything was written"
        assert adapter_of(run_dir, None).name == "step-000004"
    assert arena.faults_of_resume(run_dir) == []


def test_without_a_lock_the_second_goes_ahead(arena: Arena) -> None:
    """Negative control."""
    run_dir = arena.copy_of(arena.two_checkpoints)
    with run_lock(Storage(), run_dir, SilentReporter()):
        assert arena.server.run("unlocked", run_dir=run_dir, resume=True)["ended"] == "returned"
