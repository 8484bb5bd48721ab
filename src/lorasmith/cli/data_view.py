"""What the data verbs show: a survey as text for a terminal, and the same for machines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from rich.text import Text

from lorasmith.config import DataConfig
from lorasmith.data.check import DataReport, TokenStats
from lorasmith.data.encode import fit_length
from lorasmith.data.survey import Survey
from lorasmith.errors import DataError
from lorasmith.text.template import ChatFormat
from lorasmith.types import IGNORE_INDEX, Example

_BAR_WIDTH = 50
_UNTRAINED, _TRAINED, _REPLACED = "dim", "bold green", "bold yellow"
_GLYPHS = str.maketrans({"\n": "⏎\n", "\t": "⇥", "\r": "␍"})


@dataclass(frozen=True, slots=True)
class Context:
    """What the command line said, resolved."""

    config: DataConfig
    chat_format: ChatFormat


def check(found: Survey, context: Context, count: int) -> tuple[dict[str, Any], Text]:
    """Every row that cannot be trained on, with file:line, and what is odd about the others."""
    return found.report.to_json(), Text("\n").join(_check_lines(found.report, count))


def stats(found: Survey, context: Context, count: int) -> tuple[dict[str, Any], Text]:
    """Lengths in tokens: histogram, percentiles, totals, and the longest rows."""
    tokens = found.report.tokens
    if tokens is None:
        raise DataError(
            f"{found.report.source} has no row that can be trained on", fix="lorasmith data check"
        )
    order = np.argsort(-found.examples.lengths, kind="stable")[:count]
    longest = [found.examples[int(row)] for row in order]
    machine = found.report.to_json()["tokens"] | {
        "conversations": found.report.conversations,
        "longest_rows": {example.origin: len(example) for example in longest},
    }
    return machine, Text("\n").join(_stats_lines(found.report, tokens, longest))


def preview(found: Survey, context: Context, count: int) -> tuple[dict[str, Any], Text]:
    """The tokens of the first rows: trained ones green, the others dim, replaced targets yellow."""
    chat_format, shown = context.chat_format, _as_trained(found, context.config)[:count]
    legend = Text.assemble(
        ("trained", _TRAINED), "  ", ("not trained", _UNTRAINED), "  ", ("replaced", _REPLACED)
    )
    rows = [preview_row(example, chat_format) for example in shown]
    machine = {"rows": [_preview_json(example, chat_format) for example in shown]}
    return machine, Text("\n\n").join([legend, *rows])


def _as_trained(found: Survey, config: DataConfig) -> Sequence[Example]:
    if config.over_length == "error":  # the exit code tells; the rows are there to be looked at
        return found.examples
    return fit_length(found.examples, config.max_length, config.over_length).examples


def preview_row(example: Example, chat_format: ChatFormat) -> Text:
    """One conversation: its origin, and its text in the colours of what the model learns there."""
    line = Text.assemble(
        (f"{example.origin}  {len(example)} tokens, {example.num_targets} trained\n", "bold")
    )
    for style, steps in groupby(_steps(example), key=lambda step: step[1]):
        ids = [token for token, _ in steps]
        line.append(chat_format.tokenizer.decode(ids, skip_special=False).translate(_GLYPHS), style)
    return line


def _steps(example: Example) -> Iterator[tuple[int, str]]:
    """(token, style) of each token, and at the end the target that has no input of its own.

    A replaced target is shown behind the token that stands in its place.
    """
    ids, labels = example.input_ids.tolist(), example.labels.tolist()
    yield ids[0], _UNTRAINED
    for token, label in zip(ids[1:], labels, strict=False):
        yield token, _TRAINED if label == token else _UNTRAINED
        if label not in (IGNORE_INDEX, token):
            yield label, _REPLACED
    if labels[-1] != IGNORE_INDEX:
        yield labels[-1], _TRAINED


def _preview_json(example: Example, chat_format: ChatFormat) -> dict[str, Any]:
    ids = example.input_ids.tolist()
    return {
        "origin": example.origin,
        "input_ids": ids,
        "labels": example.labels.tolist(),
        "tokens": [chat_format.tokenizer.decode([token], skip_special=False) for token in ids],
    }


def _check_lines(report: DataReport, count: int) -> Iterator[Text]:
    yield Text(f"{report.source}: format {report.format} ({report.format_reason})")
    yield Text(f"{report.rows:,} rows, {report.conversations:,} can be trained on", "bold")
    for rule, number in report.bad_by_rule.items():
        yield Text(f"error  {rule}: {number:,}", "bold red")
        mine = [row for row in report.bad_rows if row.rule == rule]
        yield from (Text(f"  {row.origin}  {row.value_head}  ({row.fix})") for row in mine[:count])
        yield from _more(number, count)
    if report.over_length:
        yield Text(
            f"length  {len(report.over_length):,} rows have more than {report.max_length:,} tokens",
            "bold red",
        )
        yield from (Text(f"  {origin}  {length:,} tokens") for origin, length in report.over_length[:count])
        yield from _more(len(report.over_length), count)
    yield from (Text(f"warning  {line}", "yellow") for line in report.warnings)
    if not (report.bad_rows or report.over_length or report.warnings):
        yield Text("nothing odd", "green")


def _more(number: int, count: int) -> Iterator[Text]:
    if number > count:
        yield Text(f"  ... and {number - count:,} more (-n shows more, --json all)", "dim")


def _stats_lines(report: DataReport, tokens: TokenStats, longest: Sequence[Example]) -> Iterator[Text]:
    share = tokens.supervised / tokens.total
    yield Text(f"{report.conversations:,} conversations, {tokens.total:,} tokens", "bold")
    yield Text(f"{tokens.supervised:,} are trained ({share:.1%})")
    yield Text(f"length {tokens.shortest:,} to {tokens.longest:,}, mean {tokens.mean:,}")
    yield Text("  ".join(f"{name} {value:,}" for name, value in tokens.percentiles.items()))
    highest = max(number for _, _, number in tokens.bars)
    for start, end, number in tokens.bars:
        bar = "█" * -(-number * _BAR_WIDTH // highest)
        yield Text.assemble(f"{start:>7,} - {end:<7,}", (bar, "cyan"), f" {number:,}")
    if report.bad_rows:
        yield Text(
            f"left out: {len(report.bad_rows):,} bad rows (lorasmith data check names them)", "bold red"
        )
    if report.max_length:
        yield Text(f"over {report.max_length:,} tokens: {len(report.over_length):,} rows")
    yield Text("longest: " + ", ".join(f"{example.origin} ({len(example):,})" for example in longest))


def failed(report: DataReport, config: DataConfig) -> bool:
    """Whether training on this source would stop with a DataError."""
    bad = bool(report.bad_rows) and config.on_bad_row == "error"
    return bad or (bool(report.over_length) and config.over_length == "error")


SHOWS = {"check": check, "stats": stats, "preview": preview}
