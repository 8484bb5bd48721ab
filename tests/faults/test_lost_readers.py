"""Nobody reads what a run says: a closed pipe, a full disk, a terminal that went away, a stop and a start."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from test_signals import SIGNALS

import lorasmith as ls
from lorasmith.runs.progress import LiveReporter, PlainReporter, StepLine, default_reporter
from lorasmith.training.signals import stop_requests

ASSETS = Path(ls.__file__).parent / "assets"
LINE = StepLine(1, 2, 0.5, 1e-3, 1.0, 10.0, 5.0)
TRAIN = [
    *("train", "--model", str(ASSETS / "tiny"), "--data", str(ASSETS / "persona.jsonl")),
    *("--set", "train.max_steps=12", "--set", "train.logging_steps=1", "--set", "train.batch_size=4"),
]


def deaf_pipe() -> Any:
    """A stream whose other end is closed."""
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")


def deaf_terminal() -> Any:
    """A terminal that went away: writing there is an EIO."""
    master, slave = pty.openpty()
    stream = os.fdopen(slave, "w")
    os.close(master)
    return stream


def full_disk() -> Any:
    return os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")


@pytest.mark.parametrize("stream", [deaf_pipe, deaf_terminal, full_disk])
def test_lines_that_nobody_reads_are_lost_and_nothing_else(
    stream: Any, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "stdout", stream())
    reporter = PlainReporter()
    for _ in range(2):
        reporter.line(LINE)
        reporter.note("a checkpoint")
    sys.stdout.close()  # what is left in its buffer is flushed here, and refused by nobody
    assert capsys.readouterr().err.count("the run goes on without") == 1


def test_a_bar_outlives_its_terminal(monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "stdout", deaf_terminal())
    reporter = LiveReporter()
    reporter.start(0, 2)
    reporter.advance(1)
    reporter.line(LINE)
    reporter.note("a checkpoint")
    reporter.finish()
    assert os.readlink(f"/proc/self/fd/{sys.stdout.fileno()}") == os.devnull


def test_a_program_without_standard_output_has_a_reporter(monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    reporter = default_reporter()
    reporter.line(LINE)
    assert isinstance(reporter, PlainReporter)


def test_a_request_is_kept_where_it_cannot_be_answered() -> None:
    kept, deaf = os.dup(2), deaf_terminal()
    try:
        os.dup2(deaf.fileno(), 2)
        with stop_requests() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def test_under_nohup_a_hangup_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop
    finally:
        signal.signal(signal.SIGHUP, before)


def shell(arguments: Sequence[str], redirection: str) -> subprocess.CompletedProcess[str]:
    """`lorasmith ARGUMENTS redirection`, in bash; its exit status is that of lorasmith."""
    line = f'"$0" -m lorasmith "$@" {redirection}; exit ${{PIPESTATUS[0]}}'
    return subprocess.run(
        ["bash", "-c", line, sys.executable, *arguments], capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The adapter of a run that was read to its end."""
    run = tmp_path_factory.mktemp("heard") / "run"
    assert shell([*TRAIN, "-o", str(run)], "").returncode == 0
    return (run / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("redirection", ["| head -1", ">/dev/full", "<&- >&- 2>&-"])
def test_a_run_that_nobody_reads_ends_as_any_other(tmp_path: Path, heard: bytes, redirection: str) -> None:
    told = shell([*TRAIN, "-o", str(tmp_path / "run")], redirection)
    assert told.returncode == 0, told.stderr
    assert "Traceback" not in told.stderr
    assert (tmp_path / "run" / "adapter_model.safetensors").read_bytes() == heard


@pytest.mark.slow
@pytest.mark.parametrize(("redirection", "code"), [("| head -0", 1), (">&-", 0), (">/dev/full", 7)])
def test_a_report_that_nobody_reads_ends_without_a_traceback(redirection: str, code: int) -> None:
    arguments = ["data", "check", str(ASSETS / "persona.jsonl"), "--model", str(ASSETS / "tiny")]
    told = shell(arguments, redirection)
    assert told.returncode == code, told.stderr
    assert "Traceback" not in told.stderr
    assert "Exception ignored" not in told.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGCONT], ids=lambda number: number.name)
def test_a_hangup_and_a_pause(tmp_path: Path, heard: bytes, number: signal.Signals) -> None:
    """A terminal closes while its run trains; a run is stopped for a while. Both end in the same bytes."""
    run = tmp_path / "cut"
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "lorasmith", *TRAIN, "-o", str(run)],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )
    os.close(slave)
    while not (run / "metrics.jsonl").exists():
        os.read(master, 1)
    if number == signal.SIGCONT:
        process.send_signal(signal.SIGSTOP)
        time.sleep(1.0)
    else:
        os.close(master)
    process.send_signal(number)
    if number == signal.SIGCONT:
        _drain(master)
    code = process.wait(120)
    assert code == (0 if number == signal.SIGCONT else SIGNALS[number][1])
    assert _children(process.pid) == []
    if code:
        assert shell(["train", "--resume", "-o", str(run)], "").returncode == 0
    assert (run / "adapter_model.safetensors").read_bytes() == heard


def _drain(master: int) -> None:
    try:
        while os.read(master, 65536):
            pass
    except OSError:  # EIO: the other side is closed
        os.close(master)


def _children(group: int) -> list[str]:
    """Processes of the session that the ended one led."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == group:
            found.append(str(stat.parent))
    return found
