"""lorasmith generate: a file of prompts in, a file of answers out."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
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
from lorasmith.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from lorasmith.cli.prompts import PromptRow
    from lorasmith.model.model import Model
    from lorasmith.types import Example


@with_sampling
def generate(
    model_or_run: Source,
    *,
    data: Annotated[str, typer.Option(help='JSONL: {"prompt": ...} or {"messages": [...]}; - is stdin.')],
    output: Annotated[str, typer.Option(help="JSONL of the same objects with answers; - is stdout.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered at a time.")] = 8,
    force: Annotated[bool, typer.Option("--force", help="Overwrite --output.")] = False,
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
    """Answer a file of prompts."""
    from lorasmith.cli.prompts import read_prompts

    rows = read_prompts(data)
    refuse_overwriting(output, force=force)
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
    if system is not None:
        model = replace(model, system=system)
    from lorasmith.infer.generate import encode_prompts

    prompts = encode_prompts(model, [row.conversation for row in rows])
    with opened(output, force=force) as file:
        for done in write_answers(model, rows, prompts, sampling, file, batch_size=batch_size):
            if sys.stderr.isatty():
                typer.echo(f"\r{done} of {len(rows)} answered", err=True, nl=done == len(rows))


def write_answers(
    model: Model,
    rows: Sequence[PromptRow],
    prompts: Sequence[Example],
    sampling: GenerateConfig,
    file: TextIO,
    *,
    batch_size: int,
) -> Iterator[int]:
    """Write the answers batch by batch, in the order of `rows`; yields how many are written."""
    from lorasmith.cli.prompts import answered
    from lorasmith.infer.generate import answer_batches, in_batches

    batches = answer_batches(model, in_batches(prompts, batch_size), sampling)
    done = 0
    for batch, answers in zip(in_batches(rows, batch_size), batches, strict=True):
        file.writelines(answered(row, answer) + "\n" for row, answer in zip(batch, answers, strict=True))
        file.flush()
        done += len(batch)
        yield done


def refuse_overwriting(output: str, *, force: bool) -> None:
    """Raises: ConfigError if `output` exists and `force` is False."""
    if output != "-" and not force and Path(output).exists():
        fix = "choose another --output, or overwrite it with --force"
        raise ConfigError(f"{output} exists already", where="--output", fix=fix)


@contextmanager
def opened(output: str, *, force: bool) -> Iterator[TextIO]:
    """A file to write, or standard output for "-". Raises: StorageError if the disk refuses."""
    if output == "-":
        yield sys.stdout
        return
    path = Path(output)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w" if force else "x", encoding="utf-8", newline="\n") as file:
            yield file
    except OSError as error:
        raise StorageError(f"{output} cannot be written", why=str(error), fix="check --output") from error
