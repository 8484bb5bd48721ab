"""Signals that ask a run to stop: it ends at the next step's end, with a checkpoint; asked twice, at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from lorasmith.errors import Interrupted, Preempted, Terminated

_ERRORS: dict[int, type[Interrupted]] = {
    signal.SIGINT: Interrupted,
    signal.SIGTERM: Terminated,
    signal.SIGHUP: Terminated,
    signal.SIGUSR1: Preempted,
}
_ONE_REQUEST = 0.25
"""Seconds: launchers and terminals often send one request twice, within milliseconds."""


class StopRequest:
    """Whether the process was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self._signal: int | None = None
        self._since = 0.0
        self._raise_at_once = False

    def __bool__(self) -> bool:
        return self._signal is not None

    def error(self, *, after: str, go_on: str) -> Interrupted:
        """What to raise at a boundary: `after` says where it stands, `go_on` what to do."""
        assert self._signal is not None
        name = signal.Signals(self._signal).name
        return _ERRORS[self._signal](f"stopped by {name} {after}", fix=go_on)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within, where nothing is lost by it, the first request is raised as Interrupted already."""
        self._raise_at_once = True
        try:
            yield
        finally:
            self._raise_at_once = False

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The handler. Raises: Interrupted at the second request."""
        again = self._signal is not None
        if again and time.monotonic() - self._since < _ONE_REQUEST:
            return
        if again:
            raise _ERRORS[number](
                f"left at once by a second request ({signal.Signals(number).name})",
                fix="go on from the newest checkpoint by --resume",
            )
        self._signal, self._since = number, time.monotonic()
        if self._raise_at_once:
            raise _ERRORS[number]("an evaluation was given up")
        # print() is not safe in a handler: it may have interrupted another print.
        with suppress(OSError):  # after SIGHUP there is no terminal to tell
            os.write(2, b"stopping after this step, with a checkpoint; once more leaves at once\n")


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Within: SIGINT, SIGTERM, SIGHUP and SIGUSR1 are requests. Signals that were ignored, as of a job in the
    background or under nohup, stay ignored; outside the main thread nothing is changed."""
    request, before = StopRequest(), {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in _ERRORS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    before[number] = signal.signal(number, request.receive)
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
