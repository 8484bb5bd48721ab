"""Conversations -> examples of a bounded length; what is refused, dropped or truncated is named."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lorasmith.data.records import BadRow, bad_rows_error
from lorasmith.errors import DataError
from lorasmith.text.template import ChatFormat
from lorasmith.types import Conversation, Example

OverLength: TypeAlias = Literal["error", "drop", "truncate"]
_CHUNK = 1000
"""Conversations per call of the tokenizer: enough to keep it busy, few enough to keep memory flat."""


@dataclass(frozen=True)
class EncodeResult:
    """Examples in the order of their conversations, and the origins of what the length limit touched."""

    examples: tuple[Example, ...]
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
    rows = list(encode_or_refuse(conversations, chat_format))
    bad_rows = [row for row in rows if isinstance(row, BadRow)]
    if bad_rows:
        raise bad_rows_error(bad_rows, len(rows))
    return fit_length([row for row in rows if isinstance(row, Example)], max_length, over_length)


def encode_or_refuse(
    conversations: Sequence[Conversation], chat_format: ChatFormat
) -> Iterator[Example | BadRow]:
    """Each conversation, in order, as its Example, or as the BadRow that says why there is none."""
    for start in range(0, len(conversations), _CHUNK):
        chunk = conversations[start : start + _CHUNK]
        try:
            rows: Sequence[Example | BadRow] = chat_format.encode_all(chunk)
        except DataError:
            rows = [_encode_one(conversation, chat_format) for conversation in chunk]
        yield from (_refuse_nothing_to_learn(row) for row in rows)


def fit_length(examples: Sequence[Example], max_length: int | None, over_length: OverLength) -> EncodeResult:
    """`examples` with the longer ones refused, dropped, or cut at their end.

    A cut answer has no end token: its last kept position predicts the text that really followed. A row that
    keeps no label is dropped.

    Raises: DataError naming the longer rows under `over_length="error"`.
    """
    longer = [example for example in examples if max_length is not None and len(example) > max_length]
    if not longer or max_length is None:
        return EncodeResult(tuple(examples))
    if over_length == "error":
        raise _too_long(longer, max_length)
    if over_length == "drop":
        kept = tuple(example for example in examples if len(example) <= max_length)
        return EncodeResult(kept, dropped=tuple(example.origin for example in longer))
    cut = [_cut(example, max_length) for example in examples]
    return EncodeResult(
        tuple(example for example in cut if example.num_targets),
        dropped=tuple(example.origin for example in cut if not example.num_targets),
        truncated=tuple(example.origin for example in longer if _cut(example, max_length).num_targets),
    )


def _cut(example: Example, max_length: int) -> Example:
    if len(example) <= max_length:
        return example
    # Copies, because a slice would keep the whole row in memory.
    return Example(example.input_ids[:max_length].copy(), example.labels[:max_length].copy(), example.origin)


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


def _too_long(longer: Sequence[Example], max_length: int) -> DataError:
    named = ", ".join(f"{example.origin} ({len(example):,})" for example in longer[:10])
    more = f", and {len(longer) - 10:,} more" if len(longer) > 10 else ""
    return DataError(
        f"{len(longer):,} {'row is' if len(longer) == 1 else 'rows are'} longer than {max_length:,} tokens",
        where=named + more,
        why="nothing is cut or dropped unasked",
        fix=f"raise data.max_length to {max(map(len, longer))}, or set data.over_length to drop or truncate",
    )
