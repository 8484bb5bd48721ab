"""What a person sees of a run: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Protocol

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


class PlainReporter:
    """Lines of text, for logs and pipes."""

    def start(self, step: int, total_steps: int) -> None:
        pass

    def advance(self, step: int) -> None:
        pass

    def line(self, line: StepLine) -> None:
        print(describe(line), flush=True)

    def note(self, text: str) -> None:
        print(without_secrets(text), flush=True)

    def finish(self) -> None:
        pass


class LiveReporter:
    """A rich progress bar below the lines."""

    def __init__(self, console: Console | None = None) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console or Console(), transient=True)
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
        print(text, file=sys.stderr, flush=True)


def default_reporter() -> Reporter:
    return LiveReporter() if sys.stdout.isatty() else PlainReporter()


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
