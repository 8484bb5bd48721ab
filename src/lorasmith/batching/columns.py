"""Many rows in few flat arrays: a million of them cost their content, not a million objects.

Each is a sequence that makes its element on access. The arrays may be a file's pages (see cache.py).
Shape suffixes: N ids, R rows, M messages, B bytes of UTF-8.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeAlias, get_args, overload

import numpy as np
from numpy.typing import NDArray

from lorasmith.types import IGNORE_INDEX, Conversation, Example, Ints, Message, Role

Columns: TypeAlias = Mapping[str, NDArray[Any]]
_ROLES: tuple[Role, ...] = get_args(Role)
_ROLE_NUMBERS = {role: number for number, role in enumerate(_ROLES)}
_BLOCK_ROWS = 4096


@dataclass(frozen=True, eq=False)
class Texts(Sequence[str]):
    """Texts laid end to end."""

    content_B: NDArray[np.uint8]
    offsets: Ints  # (R+1,)

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        content = np.frombuffer(b"".join(encoded), np.uint8)
        return cls(content, offsets_of([len(text) for text in encoded]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        if isinstance(index, slice):
            return tuple(self[row] for row in range(*index.indices(len(self))))
        row = _in_range(index, len(self))
        start, end = self.offsets[row], self.offsets[row + 1]
        return self.content_B[start:end].tobytes().decode("utf-8", "surrogatepass")


@dataclass(frozen=True, eq=False)
class Examples(Sequence[Example]):
    """Examples over flat ids and labels; a subset or a cut of the rows shares them."""

    input_ids_N: NDArray[np.int32]
    labels_N: NDArray[np.int32]
    starts: Ints  # (R,)
    lengths: Ints  # (R,) input ids of each example
    target_counts: Ints  # (R,) labels of each example
    all_origins: Texts
    origin_rows: Ints  # (R,) where each row's origin stands in `all_origins`

    @classmethod
    def of(cls, examples: Iterable[Example]) -> Examples:
        return cls.from_columns(FlatRows.of(examples).columns())

    @classmethod
    def from_columns(cls, columns: Columns) -> Examples:
        """The inverse of `FlatRows.columns`, of any number of them joined."""
        lengths = np.asarray(columns["lengths"], np.int64)
        starts = offsets_of(lengths)[:-1]
        origins = Texts(columns["origins"], offsets_of(columns["origin_bytes"]))
        counts = np.asarray(columns["target_counts"], np.int64)
        rows = np.arange(len(lengths))
        return cls(columns["input_ids"], columns["labels"], starts, lengths, counts, origins, rows)

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return self.take(np.arange(*index.indices(len(self))))
        row = _in_range(index, len(self))
        start, end = self.starts[row], self.starts[row] + self.lengths[row]
        input_ids, labels = (ids[start:end].astype(np.int64) for ids in (self.input_ids_N, self.labels_N))
        return Example(input_ids, labels, self.origin(row))

    def origin(self, row: int) -> str:
        return self.all_origins[int(self.origin_rows[row])]

    def origins(self, rows: Iterable[int]) -> tuple[str, ...]:
        return tuple(self.origin(int(row)) for row in rows)

    def take(self, rows: Ints) -> Examples:
        """These rows, in this order."""
        return replace(
            self,
            starts=self.starts[rows],
            lengths=self.lengths[rows],
            target_counts=self.target_counts[rows],
            origin_rows=self.origin_rows[rows],
        )

    def cut(self, max_length: int) -> Examples:
        """Every example cut at its end to `max_length` input ids."""
        counts = self.target_counts.copy()
        for row in np.flatnonzero(self.lengths > max_length):
            labels = self.labels_N[self.starts[row] : self.starts[row] + max_length]
            counts[row] = np.count_nonzero(labels != IGNORE_INDEX)
        return replace(self, lengths=np.minimum(self.lengths, max_length), target_counts=counts)

    def blocks(self) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32], Ints]]:
        """(ids, labels, lengths) of all rows in order, some thousand rows at a time, each laid end to end."""
        for first in range(0, len(self), _BLOCK_ROWS):
            lengths = self.lengths[first : first + _BLOCK_ROWS]
            places = spread(self.starts[first : first + _BLOCK_ROWS], lengths)
            yield self.input_ids_N[places], self.labels_N[places], lengths


@dataclass(frozen=True, eq=False)
class Conversations(Sequence[Conversation]):
    """Conversations over flat messages; a subset shares them."""

    contents: Texts  # of M messages
    roles_M: NDArray[np.uint8]
    first_message: Ints  # of each of the rows that were laid down
    all_origins: Texts
    rows: Ints  # (R,)

    @classmethod
    def of(cls, conversations: Iterable[Conversation]) -> Conversations:
        return cls.from_columns(conversation_columns(tuple(conversations)))

    @classmethod
    def from_columns(cls, columns: Columns) -> Conversations:
        contents = Texts(columns["texts"], offsets_of(columns["text_bytes"]))
        origins = Texts(columns["origins"], offsets_of(columns["origin_bytes"]))
        first_message = offsets_of(columns["messages"])
        return cls(contents, columns["roles"], first_message, origins, np.arange(len(first_message) - 1))

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> Conversations: ...
    def __getitem__(self, index: int | slice) -> Conversation | Conversations:
        if isinstance(index, slice):
            return self.take(np.arange(*index.indices(len(self))))
        row = int(self.rows[_in_range(index, len(self))])
        numbers = range(int(self.first_message[row]), int(self.first_message[row + 1]))
        messages = (Message(_ROLES[self.roles_M[number]], self.contents[number]) for number in numbers)
        return Conversation(tuple(messages), self.all_origins[row])

    def take(self, rows: Ints) -> Conversations:
        return replace(self, rows=self.rows[rows])


@dataclass(frozen=True, eq=False)
class FlatRows:
    """Examples laid end to end, as an encoder hands them on: a few arrays, cheap to send and to join."""

    input_ids_N: NDArray[np.int32]
    labels_N: NDArray[np.int32]
    lengths: Ints
    target_counts: Ints
    origins: Texts

    @classmethod
    def of(cls, examples: Iterable[Example]) -> FlatRows:
        rows = tuple(examples)
        lengths = np.array([len(row) for row in rows], np.int64)
        labels_N = _end_to_end([row.labels for row in rows])
        targets_before = offsets_of(labels_N != IGNORE_INDEX)
        return cls(
            _end_to_end([row.input_ids for row in rows]),
            labels_N,
            lengths,
            np.diff(targets_before[offsets_of(lengths)]),
            Texts.of(row.origin for row in rows),
        )

    def columns(self) -> dict[str, NDArray[Any]]:
        return {
            "input_ids": self.input_ids_N,
            "labels": self.labels_N,
            "lengths": self.lengths.astype(np.int32),
            "target_counts": self.target_counts.astype(np.int32),
            "origins": self.origins.content_B,
            "origin_bytes": np.diff(self.origins.offsets).astype(np.int32),
        }


class GrowingColumns:
    """Columns that grow block by block; joined once, at their end."""

    def __init__(self) -> None:
        self._blocks: dict[str, list[NDArray[Any]]] = {}

    def add(self, columns: Columns) -> None:
        for name, block in columns.items():
            self._blocks.setdefault(name, []).append(block)

    def blocks(self) -> Mapping[str, Sequence[NDArray[Any]]]:
        return self._blocks

    def count(self, name: str) -> int:
        return sum(map(len, self._blocks[name]))

    def join(self) -> dict[str, NDArray[Any]]:
        """The whole columns. Each is joined in place, so that no more than one is held twice."""
        for name, blocks in self._blocks.items():
            self._blocks[name] = [np.concatenate(blocks) if len(blocks) > 1 else blocks[0]]
        return {name: blocks[0] for name, blocks in self._blocks.items()}


def conversation_columns(conversations: Sequence[Conversation]) -> dict[str, NDArray[Any]]:
    """What `Conversations.from_columns` reads."""
    messages = [message for conversation in conversations for message in conversation.messages]
    texts = Texts.of(message.content for message in messages)
    origins = Texts.of(conversation.origin for conversation in conversations)
    return {
        "texts": texts.content_B,
        "text_bytes": np.diff(texts.offsets).astype(np.int32),
        "roles": np.array([_ROLE_NUMBERS[message.role] for message in messages], np.uint8),
        "messages": np.array([len(conversation.messages) for conversation in conversations], np.int32),
        "origins": origins.content_B,
        "origin_bytes": np.diff(origins.offsets).astype(np.int32),
    }


def lengths_of(examples: Sequence[Example]) -> Ints:
    """(R,) input ids of each example; no example is made where they are stored flat."""
    if isinstance(examples, Examples):
        return examples.lengths
    return np.array([len(example) for example in examples], np.int64)


def target_counts_of(examples: Sequence[Example]) -> Ints:
    """(R,) labels of each example; no example is made where they are stored flat."""
    if isinstance(examples, Examples):
        return examples.target_counts
    return np.array([example.num_targets for example in examples], np.int64)


def largest_id(examples: Sequence[Example]) -> int:
    """The largest input id; -1 where there is none."""
    if isinstance(examples, Examples):
        return max((int(ids.max()) for ids, _, _ in examples.blocks() if len(ids)), default=-1)
    return max((int(example.input_ids.max()) for example in examples), default=-1)


def blocks_of(
    examples: Iterable[Example],
) -> Iterator[tuple[NDArray[Any], NDArray[Any], Ints]]:
    """(ids, labels, lengths) of some thousand rows at a time, in order, each laid end to end."""
    if isinstance(examples, Examples):
        yield from examples.blocks()
        return
    rows = iter(examples)
    while some := tuple(islice(rows, _BLOCK_ROWS)):
        flat = FlatRows.of(some)
        yield flat.input_ids_N, flat.labels_N, flat.lengths


def offsets_of(lengths: NDArray[Any] | Sequence[int]) -> Ints:
    """(R+1,) where each of `lengths` (R,) begins, and where the last one ends."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def spread(starts: Ints, lengths: Ints) -> Ints:
    """The indices of all elements of the runs that begin at `starts` (R,), run by run."""
    offsets = offsets_of(lengths)
    return np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])


def _end_to_end(rows: Sequence[Ints]) -> NDArray[np.int32]:
    return np.concatenate(rows).astype(np.int32) if rows else np.zeros(0, np.int32)


def _in_range(index: int, count: int) -> int:
    row = index + count if index < 0 else index
    if not 0 <= row < count:
        raise IndexError(f"row {index} of {count}")
    return row
