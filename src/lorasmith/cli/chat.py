"""lorasmith chat: answers in the terminal as they are written, for one voice or base beside tuned."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from lorasmith.cli.options import (
    Adapter,
    ChatFormatName,
    Checkpoint,
    Device,
    DtypeName,
    FamilyName,
    Hub,
    Source,
    System,
    load_checked,
    with_sampling,
)
from lorasmith.config import GenerateConfig
from lorasmith.errors import LorasmithError

if TYPE_CHECKING:
    from lorasmith.infer.chat import ChatSession
    from lorasmith.model.model import Model

HELP = """\
/reset        forget the conversation
/system TEXT  speak under this system prompt, from the beginning; alone: show it
/history      show the conversation
/help         show this
/exit         leave (or Ctrl-D)
Ctrl-C stops an answer; at the prompt it leaves."""


@with_sampling
def chat(
    model_or_run: Source,
    *,
    prompt: Annotated[str | None, typer.Option(help="Answer this alone and leave.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Base and tuned, side by side.")] = False,
    adapter: Adapter = None,
    checkpoint: Checkpoint = None,
    system: System = None,
    family: FamilyName = "auto",
    chat_format: ChatFormatName = None,
    dtype: DtypeName = "auto",
    device: Device = "auto",
    hub: Hub = "huggingface",
    sampling: GenerateConfig,
) -> None:
    """Talk to a model or a run; piped in, each line is a prompt."""
    model = load_checked(
        model_or_run,
        adapter=adapter,
        checkpoint=checkpoint,
        family=family,
        chat_format=chat_format,
        dtype=dtype,
        device=device,
        hub=hub,
    )
    voices = voices_of(model, sampling, system, compare=compare)
    if prompt is not None:
        answer(voices, prompt, sys.stdout)
    elif sys.stdin.isatty():
        about = f"{model.family.title}, {model.chat_format.name} format"
        typer.echo(f"{about}. /help lists the commands, Ctrl-D leaves.", err=True)
        talk(voices, typed_lines(input), sys.stdout)
    else:
        read_aloud(voices, sys.stdin, sys.stdout)


@dataclass(frozen=True)
class Voice:
    """A session, and whether its adapter is switched off while it speaks."""

    name: str
    session: ChatSession
    is_base: bool = False

    def stream(self, text: str) -> Generator[str, None, None]:
        from lorasmith.infer.chat import without_adapter

        with without_adapter(self.session.model) if self.is_base else nullcontext():
            yield from self.session.stream(text)


def voices_of(model: Model, sampling: GenerateConfig, system: str | None, *, compare: bool) -> list[Voice]:
    """One voice; with `compare` base and tuned. Raises: ConfigError if there is no adapter to compare."""
    from lorasmith.infer.chat import ChatSession, without_adapter

    tuned = Voice("tuned", ChatSession(model, sampling, system))
    if not compare:
        return [tuned]
    with without_adapter(model):
        return [Voice("base", ChatSession(model, sampling, system), is_base=True), tuned]


def talk(voices: list[Voice], lines: Iterable[str], out: TextIO) -> None:
    """Answer line by line, obey commands; an error or Ctrl-C ends the answer, not the talk."""
    for line in lines:
        if is_command(line):
            if not obey(voices, line, out):
                return
            continue
        try:
            answer(voices, line, out)
            _tell_if_cut(voices)
        except KeyboardInterrupt:
            out.write("\n[stopped]\n")
        except LorasmithError as error:
            typer.echo(f"error: {error}", err=True)


def read_aloud(voices: list[Voice], lines: Iterable[str], out: TextIO) -> None:
    """Answer piped lines as one conversation; the first error ends it."""
    for line in (raw.strip() for raw in lines):
        if is_command(line):
            if not obey(voices, line, out):
                return
        elif line:
            answer(voices, line, out)


def typed_lines(read: Callable[[str], str]) -> Iterator[str]:
    """What is typed, until Ctrl-D or Ctrl-C at the prompt."""
    with suppress(ImportError):  # line editing and recall, where the platform has them
        import readline  # noqa: F401
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            if line := read("> ").strip():
                yield line


def answer(voices: list[Voice], text: str, out: TextIO) -> None:
    """Stream one voice as it writes; several are shown when all have spoken."""
    if len(voices) > 1:
        show_side_by_side({voice.name: "".join(voice.stream(text)) for voice in voices}, out)
        return
    with closing(voices[0].stream(text)) as pieces:
        for piece in pieces:
            out.write(piece)
            out.flush()
    out.write("\n")


def show_side_by_side(answers: dict[str, str], out: TextIO) -> None:
    """Columns on a terminal, labelled blocks elsewhere."""
    if not out.isatty():
        out.write("".join(f"[{name}]\n{text}\n" for name, text in answers.items()))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(expand=True)
    for name in answers:
        table.add_column(name, ratio=1)
    table.add_row(*(Text(text) for text in answers.values()))
    Console(file=out).print(table)


def _tell_if_cut(voices: list[Voice]) -> None:
    lasts = [voice.session.last for voice in voices]
    if any(last and last.finish_reason == "length" for last in lasts):
        typer.echo("[cut: --max-new-tokens allows longer answers]", err=True)


def is_command(line: str) -> bool:
    """/word alone or before text; a path such as /etc/hosts is none."""
    return re.match(r"/[a-z]+(\s|$)", line) is not None


def obey(voices: list[Voice], line: str, out: TextIO) -> bool:
    """Carry out a command. Returns False if it was to leave."""
    word, _, text = line.partition(" ")
    sessions = [voice.session for voice in voices]
    if word in ("/exit", "/quit"):
        return False
    if word == "/reset":
        _start_afresh(sessions)
    elif word == "/system" and text.strip():
        for session in sessions:
            session.system = text.strip()
        _start_afresh(sessions)
    elif word == "/system":
        out.write(f"{sessions[-1].system or '(no system prompt)'}\n")
    elif word == "/history":
        out.writelines(f"{message.role}: {message.content}\n" for message in sessions[-1].history)
    else:
        out.write(HELP + "\n" if word == "/help" else f"there is no command {word}\n{HELP}\n")
    return True


def _start_afresh(sessions: Iterable[ChatSession]) -> None:
    for session in sessions:
        session.reset()
    typer.echo("[the conversation starts afresh]", err=True)
