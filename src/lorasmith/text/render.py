"""A model directory's jinja chat template, rendered as transformers does it, in a process with limits."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias

from lorasmith.errors import DataError, FamilyError, SetupError
from lorasmith.text import render_worker
from lorasmith.text.render_worker import SPAN_END, SPAN_START, receive, send

Request: TypeAlias = tuple[Sequence[Mapping[str, str]], bool]
"""Messages, and add_generation_prompt."""
Rendering: TypeAlias = str | DataError | SetupError
"""A text; what the template refuses; the limit that it broke, which no conversation comes near to."""

_ROOT = Path(__file__).resolve().parents[2]
_KEPT_VARIABLES = ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TMPDIR", "TEMP")
"""A template's process has no business with the tokens and keys in the environment."""
_WALL_SECONDS = 60.0
_WALL_SECONDS_EACH = 0.1
"""Where CPU time cannot be limited, and for a process that is stuck: far above what a busy machine needs."""


class ChatTemplate:
    """Source: transformers/utils/chat_template_utils.py (5.x), whose conventions templates are written for.

    `variables` are bos_token, eos_token, ... ; `now` is what strftime_now tells: one moment for the whole
    format, so that a prompt at midnight equals the one before. The process starts with the first rendering.
    """

    def __init__(self, source: str, variables: Mapping[str, str], now: datetime | None = None) -> None:
        now = now or datetime.now()
        self._made_of = (source, dict(variables), now)
        self._lock = threading.Lock()
        self._process: _Process | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A process does not travel to another one: there it is started anew, with the same moment."""
        return ChatTemplate, self._made_of

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        """The conversation as one string, with the span marks still in it.

        Raises: DataError if the template refuses these messages; FamilyError if it is not jinja;
        SetupError if it breaks a limit.
        """
        found = self.render_all([(messages, add_generation_prompt)])[0]
        if isinstance(found, Exception):
            raise found
        return found

    def render_all(self, requests: Sequence[Request]) -> list[Rendering]:
        """Many renderings in one exchange; behind the first SetupError, which ends it, nothing is rendered.

        Raises: FamilyError if the template is not jinja; SetupError if not even compiling it ends.
        """
        if not requests:
            return []
        with self._lock:
            try:
                return _told(self._asked(requests))
            except _ProcessEnded:
                reason = self._stopped()
            if len(requests) == 1:
                return [_limit(reason)]
            return self._one_by_one(requests)

    def _one_by_one(self, requests: Sequence[Request]) -> list[Rendering]:
        """Which request ended the process."""
        found: list[Rendering] = []
        for request in requests:
            try:
                found += _told(self._asked([request]))
            except _ProcessEnded:
                found.append(_limit(self._stopped()))
            if isinstance(found[-1], SetupError):
                break
        return found

    def _asked(self, requests: Sequence[Request]) -> list[dict[str, str]]:
        if self._process is None or not self._process.is_ours:
            self._process = _Process()
            weakref.finalize(self, self._process.stop)
            try:
                refusal = self._process.ask(_described(*self._made_of), 1, 2**16)
            except _ProcessEnded:
                raise _limit(self._stopped()) from None
            if refusal:
                self._stopped()
                raise _unfit(refusal)
        said = sum(len(message["content"]) for messages, _ in requests for message in messages)
        room = 12 * (len(requests) * render_worker.MOST_CHARACTERS + 16 * said)
        answers = self._process.ask([[list(m), prompt] for m, prompt in requests], len(requests), room)
        if not isinstance(answers, list) or len(answers) != len(requests):
            raise _ProcessEnded("not what was asked")
        return answers

    def _stopped(self) -> str:
        process, self._process = self._process, None
        return process.stop() if process else "it did not start"


class _ProcessEnded(Exception):
    pass


class _Process:
    """One worker; whoever was forked from its owner starts another."""

    def __init__(self) -> None:
        """Raises: SetupError if no process can be started."""
        paths = [str(_ROOT), *(path for path in sys.path if path)]
        environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        command = [sys.executable, "-S", "-P", "-X", "utf8", "-m", render_worker.__name__]
        self._owner, self._overdue = os.getpid(), False
        self._ended, self._deadline = threading.Event(), math.inf
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"},
            )
        except OSError as error:
            what = "no process for the chat template can be started"
            fix = "allow this program one more process"
            raise SetupError(what, why=str(error), fix=fix) from error
        threading.Thread(target=self._watch, daemon=True).start()

    @property
    def is_ours(self) -> bool:
        return self._owner == os.getpid()

    def ask(self, message: Any, count: int, room: int) -> Any:
        """Raises: _ProcessEnded if it did, or answers no JSON, or with more than `room` bytes."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._deadline = time.monotonic() + _WALL_SECONDS + count * _WALL_SECONDS_EACH
        try:
            send(self._process.stdin, message)
            return receive(self._process.stdout, room)
        except (EOFError, OSError, ValueError, RecursionError) as error:
            raise _ProcessEnded(str(error)) from error
        finally:
            self._deadline = math.inf

    def stop(self) -> str:
        """End it; why it had ended, where it had."""
        if not self.is_ours:
            return ""
        self._ended.set()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):  # what was not sent to an ended process cannot be flushed
                    pipe.close()
        with suppress(subprocess.TimeoutExpired):  # a pipe closes a moment before its process is gone
            self._process.wait(0.5)
        if self._process.poll() is None:
            self._process.kill()
        return self._why(self._process.wait())

    def _watch(self) -> None:
        """One thread that looks now and then: a timer for each exchange costs more than the exchange."""
        while not self._ended.wait(1.0):
            if time.monotonic() > self._deadline:
                self._overdue = True
                self._process.kill()
                return

    def _why(self, code: int) -> str:
        if self._overdue:
            return f"it takes longer than {_WALL_SECONDS:.0f} seconds"
        if sys.platform != "win32" and code == -signal.SIGPROF:
            return f"it computes for longer than {render_worker.CPU_SECONDS:.0f} seconds"
        return f"its process ended with code {code}" if code else "it answers what was not asked"


def take_spans(rendered: str) -> tuple[str, list[tuple[int, int]]]:
    """The string without span marks, and the (start, end) that they enclosed."""
    head, *rest = rendered.split(SPAN_START)
    text, spans = head.replace(SPAN_END, ""), []
    for part in rest:
        inside, _, after = part.partition(SPAN_END)
        spans.append((len(text), len(text) + len(inside)))
        text += inside + after.replace(SPAN_END, "")
    return text, spans


def _described(source: str, variables: Mapping[str, str], now: datetime) -> dict[str, Any]:
    return {"source": source, "variables": variables, "now": now.isoformat()}


def _unfit(refusal: Mapping[str, Any]) -> FamilyError | SetupError:
    if "limit" in refusal:
        return _limit(_LIMITS[refusal["limit"]])
    return FamilyError(
        "the model's chat template is not valid jinja",
        where=f"chat template, line {refusal['line']}",
        why=refusal["error"],
        fix="get the model's chat_template.jinja and tokenizer_config.json again",
    )


def _told(answers: Sequence[Mapping[str, str]]) -> list[Rendering]:
    told: list[Rendering] = []
    for answer in answers:
        if "text" in answer:
            told.append(answer["text"])
        elif "limit" in answer:
            told.append(_limit(_LIMITS[answer["limit"]]))
            break
        else:
            told.append(_refusal(answer["error"]))
    return told


_LIMITS = {
    render_worker.OUT_OF_MEMORY: f"it needs more memory than {render_worker.MOST_MEMORY // 2**20:,} MB",
    render_worker.TOO_LONG: f"it writes more than {render_worker.MOST_CHARACTERS:,} characters",
}


def _refusal(why: str) -> DataError:
    fix = "check the order of roles, and whether the model takes a system message"
    return DataError("the model's chat template refuses this conversation", why=why, fix=fix)


def _limit(why: str) -> SetupError:
    return SetupError(
        "the model's chat template was stopped",
        why=why,
        fix="look at this template: it is broken or hostile; get the model from a source you trust",
    )
