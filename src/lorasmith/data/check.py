"""What a data set holds and what is odd about it, as one report that the screen and --json share."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lorasmith.data.records import BadRow, head
from lorasmith.types import Conversation, Example, Message

# Zero-width and bidirectional marks (Unicode TR 36, 39), and C1 controls: allowed in text, rarely meant.
_INVISIBLE = re.compile(
    "[\u0080-\u009f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]"
)
_BARS = 16
_PERCENTILES = (1, 5, 25, 50, 75, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class Conflict:
    """One prompt that is answered in more than one way."""

    prompt_head: str
    answers: int
    origins: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TokenStats:
    """Lengths in input ids, one per conversation. `bars` are (from, up to, conversations), equally wide."""

    total: int
    supervised: int
    shortest: int
    longest: int
    mean: float
    percentiles: Mapping[str, int]
    bars: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Findings:
    """What is odd about the conversations, each finding with the rows that it is about.

    A duplicate is a row whose messages all stand in an earlier row. A repeated prompt is a row whose prompt
    (all messages before the last answer) stands in an earlier row. A conflict is a prompt with different
    answers; its rows are all that share the prompt.
    """

    duplicates: tuple[tuple[str, str], ...]
    """(the row, the earlier row)"""
    repeated_prompts: int
    conflicts: tuple[Conflict, ...]
    special_tokens: Mapping[str, tuple[str, ...]]
    role_markers: Mapping[str, tuple[str, ...]]
    invisible: Mapping[str, tuple[str, ...]]

    @property
    def conflicting_rows(self) -> int:
        return sum(len(conflict.origins) for conflict in self.conflicts)


@dataclass(frozen=True, slots=True)
class DataReport:
    """Everything that `lorasmith data check` and `stats` know about one source."""

    source: str
    format: str
    format_reason: str
    rows: int
    conversations: int
    """Rows that can be trained on, before the length limit."""
    bad_rows: tuple[BadRow, ...]
    ignored_columns: Mapping[str, int]
    findings: Findings
    tokens: TokenStats | None
    """None where there is no good row."""
    max_length: int | None
    over_length: tuple[tuple[str, int], ...]
    warnings: tuple[str, ...] = ()

    @property
    def bad_by_rule(self) -> dict[str, int]:
        return dict(Counter(row.rule for row in self.bad_rows).most_common())

    def to_json(self) -> dict[str, Any]:
        findings = asdict(self.findings) | {"conflicting_rows": self.findings.conflicting_rows}
        return asdict(self) | {"findings": findings, "bad_by_rule": self.bad_by_rule}


def prompt_of(conversation: Conversation) -> tuple[Message, ...]:
    """All messages before the last answer; a row ends with an answer."""
    return conversation.messages[:-1]


def find(
    conversations: Sequence[Conversation], special_tokens: Iterable[str], role_markers: Iterable[str]
) -> Findings:
    duplicates = _duplicates(conversations)
    by_prompt: dict[tuple[Message, ...], list[Conversation]] = defaultdict(list)
    for conversation in conversations:
        by_prompt[prompt_of(conversation)].append(conversation)
    return Findings(
        duplicates=duplicates,
        repeated_prompts=len(conversations) - len(by_prompt),
        conflicts=tuple(filter(None, map(_conflict, by_prompt.values()))),
        special_tokens=_occurrences(conversations, _any_of(special_tokens)),
        role_markers=_occurrences(conversations, _any_of(role_markers)),
        invisible={
            f"U+{ord(sign):04X}": rows for sign, rows in _occurrences(conversations, _INVISIBLE).items()
        },
    )


def token_stats(examples: Sequence[Example]) -> TokenStats | None:
    if not examples:
        return None
    lengths = np.array([len(example) for example in examples])
    values = np.percentile(lengths, _PERCENTILES, method="inverted_cdf")
    return TokenStats(
        total=int(lengths.sum()),
        supervised=sum(example.num_targets for example in examples),
        shortest=int(lengths.min()),
        longest=int(lengths.max()),
        mean=round(float(lengths.mean()), 2),
        percentiles={f"p{share}": int(value) for share, value in zip(_PERCENTILES, values, strict=True)},
        bars=_bars(lengths),
    )


def over_length_rows(examples: Sequence[Example], max_length: int | None) -> tuple[tuple[str, int], ...]:
    """(origin, tokens) of every longer row."""
    if max_length is None:
        return ()
    return tuple((example.origin, len(example)) for example in examples if len(example) > max_length)


def describe(findings: Findings, ignored_columns: Mapping[str, int], renamed_typos: int) -> tuple[str, ...]:
    """The findings as one line each, for people."""
    lines = [f"column {head(name)} is not read ({rows:,} rows)" for name, rows in ignored_columns.items()]
    if renamed_typos:
        lines.append(f"column 'instrution' is read as 'instruction' ({renamed_typos:,} rows)")
    if findings.duplicates:
        row, earlier = findings.duplicates[0]
        lines.append(f"{len(findings.duplicates):,} rows repeat an earlier row, e.g. {row} = {earlier}")
    if findings.conflicts:
        first = findings.conflicts[0]
        count = f"{len(findings.conflicts):,} prompts have different answers"
        where = " and ".join(first.origins[:2])
        lines.append(f"{count} ({findings.conflicting_rows:,} rows), e.g. {where}")
    kinds = [
        (findings.special_tokens, "the text of a special token; it stays plain text"),
        (findings.role_markers, "reads like a turn of this chat format"),
        (findings.invisible, "an invisible character"),
    ]
    for found, meaning in kinds:
        lines += [
            f"{head(sign)} in {len(rows):,} rows, e.g. {rows[0]}: {meaning}" for sign, rows in found.items()
        ]
    return tuple(lines)


def _duplicates(conversations: Sequence[Conversation]) -> tuple[tuple[str, str], ...]:
    first: dict[tuple[Message, ...], str] = {}
    pairs = [(row.origin, first.setdefault(row.messages, row.origin)) for row in conversations]
    return tuple((origin, earlier) for origin, earlier in pairs if origin != earlier)


def _conflict(same_prompt: Sequence[Conversation]) -> Conflict | None:
    answers = {conversation.messages[-1].content for conversation in same_prompt}
    if len(answers) < 2:
        return None
    question = prompt_of(same_prompt[0])[-1].content
    return Conflict(head(question), len(answers), tuple(row.origin for row in same_prompt))


def _any_of(texts: Iterable[str]) -> re.Pattern[str] | None:
    # Longest first: of two that begin alike, the longer one is meant.
    escaped = [re.escape(text) for text in sorted(texts, key=len, reverse=True) if text.strip()]
    return re.compile("|".join(escaped)) if escaped else None


def _occurrences(
    conversations: Sequence[Conversation], pattern: re.Pattern[str] | None
) -> dict[str, tuple[str, ...]]:
    """What the pattern finds in message texts -> the rows that hold it, each row once."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for conversation in conversations if pattern else ():
        for message in conversation.messages:
            for text in pattern.findall(message.content) if pattern else ():
                found[text][conversation.origin] = None
    return {text: tuple(origins) for text, origins in found.items()}


def _bars(lengths: np.ndarray[Any, np.dtype[np.int64]]) -> tuple[tuple[int, int, int], ...]:
    low, high = int(lengths.min()), int(lengths.max())
    width = max(1, -(-(high - low + 1) // _BARS))
    edges = np.arange(low, high + width + 1, width)
    counts, _ = np.histogram(lengths, bins=edges)
    return tuple(
        (int(start), int(start) + width - 1, int(count)) for start, count in zip(edges, counts, strict=False)
    )
