"""The command line: verbs, and errors told in four lines instead of a traceback."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from contextlib import suppress
from importlib import import_module
from typing import Any, NamedTuple, NoReturn, cast

import typer
import typer.main
from typer.core import TyperGroup

from lorasmith.errors import LorasmithError, SetupError, StorageError
from lorasmith.redaction import without_secrets

_LONGEST_SHOWN = 200
"""Characters of a path that is told."""


class Verb(NamedTuple):
    """Where a verb lives, and what the help of the whole says of it (a test holds it to the verb's own)."""

    module: str
    name: str
    help: str
    command: str | None = None
    """The class of its command in that module, where it is no plain one."""


VERBS = {
    "demo": Verb(
        "demo", "demo", "Give a tiny model a new voice: about a minute on a laptop's CPU, no network."
    ),
    "train": Verb("train", "train", "Fine-tune a LoRA adapter.", "ResumeCommand"),
    "chat": Verb("chat", "chat", "Talk to a model or a run; piped in, each line is a prompt."),
    "generate": Verb("generate", "generate", "Answer a file of prompts."),
    "runs": Verb("runs", "runs", "List runs: state, step, losses, and which checkpoints verify."),
    "merge": Verb("merge", "merge", "Merge an adapter into its base model."),
    "convert": Verb(
        "convert",
        "convert",
        "Convert a Baichuan2 or ChatGLM3 adapter to the native layout of its model, or back.",
    ),
    "verify": Verb("verify", "verify", "Replay the prompts of golden.json and say what moved, by how much."),
    "doctor": Verb(
        "doctor", "doctor", "Check machine, libraries, disk and model; offline, downloads nothing."
    ),
    "families": Verb("families", "families", "List the model families."),
    "download": Verb(
        "download", "download", "Fetch a model's files (never its code); prints their directory."
    ),
    "data": Verb("data", "app", "Look at training rows before you train on them."),
}


class LazyVerbs(TyperGroup):
    """A group that imports a verb's file when that verb is called, or its own help is asked."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = cast(Any, dict.fromkeys(VERBS))  # the names, for "did you mean"

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The verb itself, with its options; None if there is none of this name."""
        if cmd_name not in VERBS:
            return None
        verb = VERBS[cmd_name]
        module = import_module(f"lorasmith.cli.{verb.module}")
        found = getattr(module, verb.name)
        if not isinstance(found, typer.Typer):
            run, found = found, typer.Typer(add_completion=False, rich_markup_mode=None)
            found.command(cls=getattr(module, verb.command) if verb.command else None)(run)
        command = typer.main.get_command(found)
        command.name = cmd_name
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The names and one line each, from the table above: nothing is imported for it."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, verb.help) for name, verb in VERBS.items()])


app = typer.Typer(
    name="lorasmith",
    cls=LazyVerbs,
    help="Give an open chat model a new voice: LoRA fine-tuning you can trust.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich takes a fifth of a second to load
    epilog="Any verb takes --debug, which shows the traceback of an error.",
)


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"lorasmith {installed('lorasmith')}")
        raise typer.Exit


def main() -> None:
    """Run one verb. Exit codes: 0, or that of the error (see `lorasmith.errors`), 130 on Ctrl-C."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    warnings.showwarning = _one_line
    sys.excepthook = _print_traceback
    _open_closed_streams()
    try:
        _require_working_directory()
        app()
    except LorasmithError as error:
        _leave(error, error, debug)
    except OSError as error:
        if error.errno is None:  # none of the system's own
            raise
        _leave(_refusal(error), error, debug)
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)


def _leave(told: LorasmithError, error: Exception, debug: bool) -> NoReturn:
    if debug:
        _print_traceback(type(error), error)
    else:
        with suppress(OSError):  # nobody reads it: the exit code says it too
            typer.echo(f"error: {told}", err=True)
    sys.exit(told.exit_code)


def _refusal(error: OSError) -> StorageError:
    """What the system would not do, where no reader or writer of ours has told it better."""
    try:
        sys.stdout.flush()
    except OSError:  # it was standard output that refused, and it would again when the process ends
        from lorasmith.runs.progress import lead_nowhere

        lead_nowhere(sys.stdout)
    path = str(error.filename or "standard output, or a file unnamed")
    shown = path if len(path) <= _LONGEST_SHOWN else f"{path[:_LONGEST_SHOWN]}..."
    fix = "check this path, its file system and your rights; --debug shows who asked"
    return StorageError(f"the system refuses: {error.strerror}", where=shown, fix=fix)


def _open_closed_streams() -> None:
    """A file opened later would get the number of a closed stream, and what is said be written into it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8", closefd=False)


def _require_working_directory() -> None:
    """torch cannot be loaded from nowhere: its libraries end the process."""
    try:
        os.getcwd()
    except FileNotFoundError:
        fix = "change to a directory that exists: cd"
        raise SetupError(
            "the working directory was deleted", where=os.environ.get("PWD", ""), fix=fix
        ) from None


def _one_line(message: Warning | str, *_: object, **__: object) -> None:
    typer.echo(f"warning: {without_secrets(str(message))}", err=True)


def _print_traceback(kind: type[BaseException], error: BaseException, *_: object) -> None:
    """What a library says in its own errors may hold a token."""
    typer.echo(without_secrets("".join(traceback.format_exception(error))), err=True, nl=False)
