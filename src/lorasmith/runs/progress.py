"""What a person sees of a run: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from lorasmith.redaction import without_secrets


@dataclass(frozen=True)
class StepLine:
    """One line of progress. Units: tokens per second, seconds."""

    step: int
    total_steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    eta_seconds: float


class Reporter(Protocol):
    """Told about a run as it goes. `note` is for single events: a resume, a checkpoint, an evaluation."""

    def start(self, step: int, total_steps: int) -> None: ...

    def advance(self, step: int) -> None: ...

    def line(self, line: StepLine) -> None: ...

    def note(self, text: str) -> None: ...

    def finish(self) -> None: ...


@contextmanager
def perhaps_unheard(stream: TextIO | None) -> Iterator[None]:
    """What is said to a terminal that has gone, a closed pipe or a full disk is lost, and a run goes on: from
    then on `stream` leads nowhere. metrics.jsonl has the numbers all the same."""
    try:
        yield
    except OSError as error:
        if stream is None:
            raise
        lead_nowhere(stream)
        if stream is not sys.stderr:
            say(f"cannot write to standard output ({error.strerror}): the run goes on without", sys.stderr)


def lead_nowhere(stream: TextIO) -> None:
    """What is left in its buffer goes there too: it cannot fail when the process ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def say(text: str, stream: TextIO | None = None) -> None:
    """A line to `stream`, by default standard output, if somebody is there to read it."""
    to = stream or sys.stdout
    with perhaps_unheard(to):
        print(text, file=to, flush=True)


class _Output:
    """A stream as `perhaps_unheard` has it, for rich, which also writes from a thread of its own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with perhaps_unheard(self._stream):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with perhaps_unheard(self._stream):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class PlainReporter:
    """Lines of text, for logs and pipes."""

    def start(self, step: int, total_steps: int) -> None:
        pass

    def advance(self, step: int) -> None:
        pass

    def line(self, line: StepLine) -> None:
        say(describe(line))

    def note(self, text: str) -> None:
        say(without_secrets(text))

    def finish(self) -> None:
        pass


class LiveReporter:
    """A rich progress bar below the lines."""

    def __init__(self, console: Console | None = None) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        seen = console or Console(file=cast(TextIO, _Output(sys.stdout)))
        self._progress = Progress(*columns, console=seen, transient=True)
        self._task: TaskID | None = None

    def start(self, step: int, total_steps: int) -> None:
        self._progress.start()
        self._task = self._progress.add_task("training", total=total_steps, completed=step)

    def advance(self, step: int) -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=step)

    def line(self, line: StepLine) -> None:
        self._progress.console.print(describe(line), highlight=False)

    def note(self, text: str) -> None:
        shown = without_secrets(text)
        self._progress.console.print(shown, style="dim", highlight=False, markup=False)

    def finish(self) -> None:
        self._progress.stop()


class SilentReporter(PlainReporter):
    """Says nothing: for tests and for callers with a display of their own."""

    def line(self, line: StepLine) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class EventReporter(SilentReporter):
    """Single events only, to standard error: where standard output is for a program."""

    def note(self, text: str) -> None:
        say(text, sys.stderr)


def default_reporter() -> Reporter:
    seen = sys.stdout is not None and sys.stdout.isatty()
    return LiveReporter() if seen else PlainReporter()


def describe(line: StepLine) -> str:
    width = len(str(line.total_steps))
    return (
        f"step {line.step:>{width}}/{line.total_steps}  loss {line.loss:7.4f}  lr {line.learning_rate:.2e}  "
        f"grad {line.grad_norm:6.3f}  {line.tokens_per_second:,.0f} tok/s  ETA {duration(line.eta_seconds)}"
    )


def duration(seconds: float) -> str:
    """75 -> "1m15s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
