"""Conversations -> examples of a bounded length; what is refused, dropped or truncated is named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from lorasmith.batching.columns import Examples, FlatRows, GrowingColumns
from lorasmith.errors import DataError
from lorasmith.rows.records import BadRow, bad_rows_error
from lorasmith.text.template import ChatFormat
from lorasmith.types import Conversation, Example, Ints

OverLength: TypeAlias = Literal["error", "drop", "truncate"]
CHUNK = 1000
"""Conversations per call of the tokenizer: enough to keep it busy, few enough to keep memory flat."""


@dataclass(frozen=True, eq=False)
class EncodedChunk:
    """Some conversations as flat rows; `kept` are the indices of those that have one, in order."""

    rows: FlatRows
    kept: tuple[int, ...]
    bad_rows: tuple[BadRow, ...]


@dataclass(frozen=True, eq=False)
class EncodeResult:
    """Examples in the order of their conversations, and the origins of what the length limit touched."""

    examples: Examples
    kept: Ints
    """Which of the examples before the limit these are."""
    dropped: tuple[str, ...] = ()
    truncated: tuple[str, ...] = ()


def encode_conversations(
    conversations: Sequence[Conversation],
    chat_format: ChatFormat,
    *,
    max_length: int | None,
    over_length: OverLength,
) -> EncodeResult:
    """Examples of at most `max_length` input ids each.

    Raises: DataError naming the rows that the format refuses, that have nothing to learn, or that are too
    long under `over_length="error"`.
    """
    columns, bad_rows = GrowingColumns(), list[BadRow]()
    columns.add(FlatRows.of(()).columns())
    for start in range(0, len(conversations), CHUNK):
        chunk = encode_chunk(conversations[start : start + CHUNK], chat_format)
        columns.add(chunk.rows.columns())
        bad_rows += chunk.bad_rows
    if bad_rows:
        raise bad_rows_error(bad_rows, len(conversations))
    return fit_length(Examples.from_columns(columns.join()), max_length, over_length)


def encode_chunk(conversations: Sequence[Conversation], chat_format: ChatFormat) -> EncodedChunk:
    """Each conversation, in order, as its row, or as the BadRow that says why there is none."""
    try:
        encoded: Sequence[Example | BadRow] = chat_format.encode_all(conversations)
    except DataError:
        encoded = [_encode_one(conversation, chat_format) for conversation in conversations]
    chunk = _laid_out(encoded)
    if chunk.rows.target_counts.all():
        return chunk
    return _laid_out([_refuse_nothing_to_learn(row) for row in encoded])


def fit_length(examples: Examples, max_length: int | None, over_length: OverLength) -> EncodeResult:
    """`examples` with the longer ones refused, dropped, or cut at their end.

    A cut answer has no end token: its last kept position predicts the text that really followed. A row that
    keeps no label is dropped.

    Raises: DataError naming the longer rows under `over_length="error"`.
    """
    is_longer = examples.lengths > (max_length if max_length is not None else np.inf)
    if max_length is None or not is_longer.any():
        return EncodeResult(examples, np.arange(len(examples)))
    if over_length == "error":
        raise _too_long(examples.take(np.flatnonzero(is_longer)), max_length)
    cut = examples.cut(max_length) if over_length == "truncate" else examples
    stays = cut.target_counts > 0 if over_length == "truncate" else ~is_longer
    kept = np.flatnonzero(stays)
    return EncodeResult(
        cut.take(kept),
        kept,
        dropped=examples.origins(np.flatnonzero(~stays)),
        truncated=examples.origins(np.flatnonzero(stays & is_longer)),
    )


def _laid_out(encoded: Sequence[Example | BadRow]) -> EncodedChunk:
    return EncodedChunk(
        FlatRows.of(row for row in encoded if isinstance(row, Example)),
        tuple(index for index, row in enumerate(encoded) if isinstance(row, Example)),
        tuple(row for row in encoded if isinstance(row, BadRow)),
    )


def _encode_one(conversation: Conversation, chat_format: ChatFormat) -> Example | BadRow:
    try:
        return chat_format.encode(conversation)
    except DataError as error:
        value = f"{error.what}: {error.why}" if error.why else error.what
        return BadRow(
            conversation.origin, "format-refuses", value, error.fix or "change the row or remove it"
        )


def _refuse_nothing_to_learn(row: Example | BadRow) -> Example | BadRow:
    if isinstance(row, Example) and not row.num_targets:
        value = f"{len(row)} tokens, none of them supervised"
        return BadRow(row.origin, "nothing-to-learn", value, "give the row an answer, or remove it")
    return row


def _too_long(longer: Examples, max_length: int) -> DataError:
    lengths = longer.lengths.tolist()
    first = zip(longer.origins(range(min(10, len(longer)))), lengths, strict=False)
    named = ", ".join(f"{origin} ({length:,})" for origin, length in first)
    more = f", and {len(longer) - 10:,} more" if len(longer) > 10 else ""
    return DataError(
        f"{len(longer):,} {'row is' if len(longer) == 1 else 'rows are'} longer than {max_length:,} tokens",
        where=named + more,
        why="nothing is cut or dropped unasked",
        fix=f"raise data.max_length to {max(lengths)}, or set data.over_length to drop or truncate",
    )
