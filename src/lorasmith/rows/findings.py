"""What is odd about conversations, found as they stream past: 32 bytes of each are remembered, not its text.

Equality is that of 16-byte BLAKE2b digests: among a billion rows, two different ones share a digest with a
chance below 1e-20.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorasmith.rows.records import head
from lorasmith.types import Conversation, Ints, Message

# Zero-width and bidirectional marks (Unicode TR 36, 39), and C1 controls: allowed in text, rarely meant.
_INVISIBLE = re.compile(
    "[\u0080-\u009f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]"
)
_BETWEEN = "\x00"  # in no row's text, so no pattern matches across it
_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class Conflict:
    """One prompt that is answered in more than one way."""

    prompt_head: str
    answers: int
    origins: tuple[str, ...]


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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Findings:
        """The inverse of `to_json`, also after JSON has made lists of its tuples."""
        conflicts = (Conflict(c["prompt_head"], c["answers"], tuple(c["origins"])) for c in tree["conflicts"])
        return cls(
            tuple((row, earlier) for row, earlier in tree["duplicates"]),
            tree["repeated_prompts"],
            tuple(conflicts),
            *({text: tuple(rows) for text, rows in tree[kind].items()} for kind in _KINDS),
        )


_KINDS = ("special_tokens", "role_markers", "invisible")


def prompt_of(conversation: Conversation) -> tuple[Message, ...]:
    """All messages before the last answer; a row ends with an answer."""
    return conversation.messages[:-1]


def find(
    conversations: Sequence[Conversation], special_tokens: Iterable[str], role_markers: Iterable[str]
) -> Findings:
    finder = Finder(special_tokens, role_markers)
    finder.add(conversations)
    return finder.findings(conversations)


class Finder:
    """Add all conversations, in their order, some at a time; then ask for the findings."""

    def __init__(self, special_tokens: Iterable[str], role_markers: Iterable[str]) -> None:
        self._patterns = (_any_of(special_tokens), _any_of(role_markers), _INVISIBLE)
        self._found: tuple[dict[str, dict[str, None]], ...] = tuple(defaultdict(dict) for _ in _KINDS)
        self._prompts, self._rows = bytearray(), bytearray()

    def add(self, conversations: Sequence[Conversation]) -> None:
        for conversation in conversations:
            self._digest(conversation)
        text = _BETWEEN.join(message.content for row in conversations for message in row.messages)
        for pattern, found in zip(self._patterns, self._found, strict=True):
            if pattern is not None and pattern.search(text):
                _note_occurrences(conversations, pattern, found)

    def findings(self, conversations: Sequence[Conversation]) -> Findings:
        """`conversations` are all that were added; the few that a finding quotes are looked at again."""
        first_of_row, first_of_prompt = _first_equals(self._rows), _first_equals(self._prompts)
        repeats = np.flatnonzero(first_of_row != np.arange(len(first_of_row)))
        occurrences = ({text: tuple(rows) for text, rows in found.items()} for found in self._found)
        return Findings(
            tuple(
                (conversations[row].origin, conversations[int(first_of_row[row])].origin)
                for row in repeats.tolist()
            ),
            int((first_of_prompt != np.arange(len(first_of_prompt))).sum()),
            tuple(_conflicts(conversations, first_of_prompt, first_of_row)),
            *occurrences,
        )

    def _digest(self, conversation: Conversation) -> None:
        digest = blake2b(digest_size=_DIGEST_BYTES)
        *prompt, answer = conversation.messages
        for message in prompt:
            digest.update(_distinctly(message))
        self._prompts += digest.digest()
        digest.update(_distinctly(answer))
        self._rows += digest.digest()


def _distinctly(message: Message) -> bytes:
    """No two sequences of messages join to the same bytes."""
    text = message.content.encode("utf-8", "surrogatepass")
    return f"{message.role}{len(text)}:".encode() + text


def _first_equals(digests: bytearray) -> Ints:
    """For each row the first row with the same digest; by sorting, so that memory stays a few arrays."""
    halves = np.frombuffer(bytes(digests), np.uint64).reshape(-1, 2)
    order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: equal rows keep their order
    is_new = np.ones(len(order), bool)
    is_new[1:] = (halves[order[1:]] != halves[order[:-1]]).any(axis=1)
    first = np.empty(len(order), np.int64)
    first[order] = order[is_new][np.cumsum(is_new) - 1]
    return first


def _conflicts(
    conversations: Sequence[Conversation], first_of_prompt: Ints, first_of_row: Ints
) -> Iterator[Conflict]:
    """Prompts whose rows are not all equal, by their first rows."""
    for rows in _groups(first_of_prompt):
        answers = len(np.unique(first_of_row[rows]))
        if answers > 1:
            question = prompt_of(conversations[int(rows[0])])[-1].content
            origins = tuple(conversations[row].origin for row in rows.tolist())
            yield Conflict(head(question), answers, origins)


def _groups(first: Ints) -> list[NDArray[np.int64]]:
    """The rows of each first row that has more than one, in order."""
    shared = np.flatnonzero(np.bincount(first, minlength=len(first))[first] > 1)
    order = shared[np.argsort(first[shared], kind="stable")]
    ends = np.flatnonzero(np.diff(first[order])) + 1
    return [group for group in np.split(order, ends) if len(group)]


def _any_of(texts: Iterable[str]) -> re.Pattern[str] | None:
    # Longest first: of two that begin alike, the longer one is meant.
    escaped = [re.escape(text) for text in sorted(texts, key=len, reverse=True) if text.strip()]
    return re.compile("|".join(escaped)) if escaped else None


def _note_occurrences(
    conversations: Iterable[Conversation], pattern: re.Pattern[str], found: dict[str, dict[str, None]]
) -> None:
    """What the pattern finds in message texts -> the rows that hold it, each row once."""
    for conversation in conversations:
        for message in conversation.messages:
            for text in pattern.findall(message.content):
                sign = f"U+{ord(text):04X}" if pattern is _INVISIBLE else text
                found[sign][conversation.origin] = None
