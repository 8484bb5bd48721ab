"""A process that loads torch and a tiny model once, and runs each trial in a fork of itself.

As a program it reads one JSON request per line: {"task": name, "args": {...}, "send": null or
[seconds, signal]}, and answers each with {"ended": "returned" | "raised" | "killed" | "hung", "value": ...,
"seconds": float}.
One thread only: a fork of a process that has started OpenMP threads waits for them for ever.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_TESTS = Path(__file__).resolve().parents[1]
_LIMIT = 300.0
"""Seconds after which a trial counts as hung."""


class ForkServer:
    """The client's side. Not for several threads."""

    def __init__(self, base: Path) -> None:
        paths = [
            str(_TESTS),
            str(_TESTS / "faults"),
            str(_TESTS.parent / "src"),
            os.environ.get("PYTHONPATH", ""),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(base)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n", "the fork server did not start"

    def run(
        self, task: str, *, kill_after: float | None = None, kill_by: int = signal.SIGKILL, **args: Any
    ) -> dict[str, Any]:
        """What became of the task, which is sent the signal `kill_by` after so many seconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        plain = {key: str(value) if isinstance(value, Path) else value for key, value in args.items()}
        send = None if kill_after is None else (kill_after, int(kill_by))
        self._process.stdin.write(json.dumps({"task": task, "args": plain, "send": send}) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        assert answer["ended"] != "hung", f"{task} took more than {_LIMIT} s"
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


def _serve(base: Path) -> None:
    import real_disks
    import trials

    replies, sys.stdout = sys.stdout, sys.stderr
    trials.warm_up(base)
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        task = getattr(trials, request["task"], None) or getattr(real_disks, request["task"])
        answer = _forked(task, request["args"], request["send"])
        print(json.dumps(answer), file=replies, flush=True)


def _forked(task: Any, args: dict[str, Any], send: tuple[float, int] | None) -> dict[str, Any]:
    reading, writing = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _tell(writing, task, args)
        os._exit(0)
    os.close(writing)
    signals = [(_LIMIT, int(signal.SIGKILL))]
    answer = _answer(reading, child, signals if send is None else [send, *signals])
    os.close(reading)
    os.waitpid(child, 0)
    return {**answer, "seconds": time.monotonic() - started}


def _tell(writing: int, task: Any, args: dict[str, Any]) -> None:
    try:
        answer = {"ended": "returned", "value": task(**args)}
    except BaseException as error:
        code = getattr(error, "exit_code", None)
        answer = {"ended": "raised", "value": [type(error).__name__, str(error), code]}
    with os.fdopen(writing, "w") as pipe:
        json.dump(answer, pipe)


def _answer(reading: int, child: int, signals: list[tuple[float, int]]) -> dict[str, Any]:
    """The child gets each signal when its time is over; the last one means that it hangs."""
    started, text = time.monotonic(), b""
    for seconds, number in signals:
        while select.select([reading], [], [], max(0.0, started + seconds - time.monotonic()))[0]:
            chunk = os.read(reading, 65536)
            if not chunk:
                return json.loads(text) if text else {"ended": "killed", "value": None}
            text += chunk
        os.kill(child, number)
    return {"ended": "hung", "value": None}


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
