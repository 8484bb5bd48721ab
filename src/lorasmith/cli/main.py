"""The command line: verbs, and errors told in four lines instead of a traceback."""

from __future__ import annotations

import sys
import traceback
import warnings

import typer

from lorasmith.cli import (
    chat,
    convert,
    data,
    demo,
    doctor,
    download,
    families,
    generate,
    merge,
    train,
    verify,
)
from lorasmith.errors import LorasmithError

app = typer.Typer(
    name="lorasmith",
    help="Give an open chat model a new voice: LoRA fine-tuning you can trust.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich takes a fifth of a second to load
    epilog="Any verb takes --debug, which shows the traceback of an error.",
)
app.command("demo")(demo.demo)
app.command("train")(train.train)
app.command("chat")(chat.chat)
app.command("generate")(generate.generate)
app.command("merge")(merge.merge)
app.command("convert")(convert.convert)
app.command("verify")(verify.verify)
app.command("doctor")(doctor.doctor)
app.add_typer(data.app, name="data")
app.command("families")(families.families)
app.command("download")(download.download)


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
    try:
        app()
    except LorasmithError as error:
        if debug:
            traceback.print_exception(error)
        else:
            typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)


def _one_line(message: Warning | str, *_: object, **__: object) -> None:
    typer.echo(f"warning: {message}", err=True)
