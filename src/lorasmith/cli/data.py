"""`lorasmith data check | stats | preview`: what a data file becomes, before time is spent on training."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from lorasmith.config import DataConfig, validate
from lorasmith.errors import ConfigError, DataError
from lorasmith.redaction import tree_without_secrets

app = typer.Typer(
    help="Look at training rows before you train on them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

File = Annotated[
    str, typer.Argument(help="A .json, .jsonl, .csv, .parquet file, also .gz, or a hub data set.")
]
Model = Annotated[str, typer.Option(help="Directory of the model; its tokenizer and config.json are read.")]
Family = Annotated[str, typer.Option(help="As `lorasmith families` lists it; auto reads config.json.")]
Format = Annotated[str, typer.Option("--chat-format", help="official or tutorial.")]
RowFormat = Annotated[
    str, typer.Option("--format", help="auto, alpaca, sharegpt, messages, prompt-completion.")
]
Columns = Annotated[list[str] | None, typer.Option("--column", help="OURS=THEIRS, e.g. output=answer.")]
System = Annotated[str | None, typer.Option(help="System prompt of conversations that have none.")]
Separator = Annotated[str, typer.Option(help="Stands between `instruction` and `input`.")]
MaxLength = Annotated[
    int | None, typer.Option(help="Longest conversation in tokens; else the model's limit.")
]
Hub = Annotated[str, typer.Option(help="Where a hub name is looked up: huggingface or modelscope.")]
OverLength = Annotated[str, typer.Option(help="error, drop or truncate: is a longer row an error?")]
OnBadRow = Annotated[str, typer.Option(help="error or skip: is a bad row an error?")]
AsJson = Annotated[bool, typer.Option("--json", help="The same for machines.")]
Count = Annotated[int, typer.Option("-n", min=1, help="Rows to show of each kind.")]


def _config(columns: list[str] | None, **fields: Any) -> DataConfig:
    pairs = [text.partition("=") for text in columns or []]
    for ours, equals, theirs in pairs:
        if not (ours and equals and theirs):
            raise ConfigError(
                f"--column {ours + equals + theirs!r} is not OURS=THEIRS", fix="e.g. output=answer"
            )
    tree = fields | {"columns": {ours: theirs for ours, _, theirs in pairs}}
    return validate(DataConfig, tree, where="command line")


def _add_verb(name: str, help_text: str) -> None:
    """One signature for all verbs, so that a flag means the same in each."""

    def verb(
        file: File,
        model: Model,
        family: Family = "auto",
        chat_format: Format = "official",
        hub: Hub = "huggingface",
        format: RowFormat = "auto",
        column: Columns = None,
        system: System = None,
        input_separator: Separator = "",
        max_length: MaxLength = None,
        over_length: OverLength = "error",
        on_bad_row: OnBadRow = "error",
        count: Count = 10,
        as_json: AsJson = False,
    ) -> None:
        from rich.console import Console

        from lorasmith import api
        from lorasmith.cli import data_view
        from lorasmith.data.survey import survey
        from lorasmith.families.opening import context_length

        writer = api.load_chat_format(model, family=family, chat_format=chat_format, hub=hub)
        config = _config(
            column,
            train=file,
            format=format,
            system=system,
            input_separator=input_separator,
            max_length=max_length or context_length(api.download(model, hub=hub)),
            over_length=over_length,
            on_bad_row=on_bad_row,
        )
        found = survey(file, config, writer, max_length=config.max_length)
        machine, text = data_view.SHOWS[name](found, data_view.Context(config, writer), count)
        if as_json:
            typer.echo(json.dumps(tree_without_secrets(machine), ensure_ascii=False))
        else:
            Console().print(text, soft_wrap=True)
        if data_view.failed(found.report, config):
            raise typer.Exit(DataError.exit_code)

    app.command(name, help=help_text)(verb)


_add_verb("check", "Every row that cannot be trained on, with file:line, and what is odd about the others.")
_add_verb("stats", "Lengths in tokens: histogram, percentiles, totals, and the longest rows.")
_add_verb(
    "preview", "The tokens of the first rows: trained ones green, the others dim, replaced targets yellow."
)
