"""A data source, read, checked and encoded in one pass, or taken from the cache: one report either way."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from lorasmith.batching.columns import Conversations, Examples, FlatRows, GrowingColumns, conversation_columns
from lorasmith.config import DataConfig
from lorasmith.data.cache import Cache, entry_key, user_cache
from lorasmith.data.check import DataReport, describe, over_length_rows, token_stats
from lorasmith.data.encode import CHUNK
from lorasmith.data.workers import encode_chunks
from lorasmith.errors import ConfigError, SetupError
from lorasmith.rows.conversation import (
    TYPO,
    Detection,
    RowRules,
    check_columns,
    detect_format,
    to_conversation,
    unread_columns,
)
from lorasmith.rows.findings import Finder, Findings
from lorasmith.rows.records import KINDS, BadRow, Record, Row, read_records, table_rows
from lorasmith.rows.source import DEFAULT_LIMITS
from lorasmith.text.template import ChatFormat
from lorasmith.types import Conversation

_DETECTION_ROWS = 200
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, eq=False)
class Survey:
    """A source, read and encoded, before anything is decided: `examples[i]` is `conversations[i]`, uncut."""

    report: DataReport
    conversations: Conversations
    examples: Examples


def survey(
    source: str,
    config: DataConfig,
    chat_format: ChatFormat,
    *,
    max_length: int | None = None,
    workers: int | None = None,
    cache: Cache | None = None,
) -> Survey:
    """Everything there is to know about a source. Bad rows are in the report and raise nothing.

    `workers` is the number of tokeniser processes (None: as many as pay), `cache` where encoded rows are kept
    (None: the user's own); neither changes what comes out.

    Raises: DataError if the source as a whole cannot be read or its format is unclear.
    """
    _require_source(source)
    check_columns(config.columns)
    kept = (cache or user_cache()) if config.cache and _is_file(source) else None
    found = _cached(source, config, chat_format, workers, kept) if kept else None
    facts, conversations, examples = found or _read(source, config, chat_format, workers).settled()
    report = DataReport(
        source=source,
        format=facts.detection.format,
        format_reason=facts.detection.reason,
        rows=len(conversations) + len(facts.bad_rows),
        conversations=len(conversations),
        bad_rows=facts.bad_rows,
        ignored_columns=dict(facts.ignored),
        findings=facts.findings,
        tokens=token_stats(examples),
        max_length=max_length,
        over_length=over_length_rows(examples, max_length),
        warnings=describe(facts.findings, facts.ignored, facts.typos),
    )
    return Survey(report, conversations, examples)


@dataclass(frozen=True, eq=False)
class _Facts:
    """What is known of the rows besides their content."""

    detection: Detection
    bad_rows: tuple[BadRow, ...]
    ignored: dict[str, int]
    typos: int
    findings: Findings

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> _Facts:
        bad_rows = tuple(BadRow(**row) for row in tree["bad_rows"])
        detection, findings = Detection(**tree["detection"]), Findings.from_json(tree["findings"])
        return cls(detection, bad_rows, tree["ignored"], tree["typos"], findings)


_Found = tuple[_Facts, Conversations, Examples]


@dataclass(frozen=True, eq=False)
class _Reading:
    facts: _Facts
    columns: GrowingColumns

    def settled(self) -> _Found:
        return (self.facts, *_of_columns(self.columns.join()))


def _cached(
    source: str, config: DataConfig, chat_format: ChatFormat, workers: int | None, cache: Cache
) -> _Found | None:
    """From the cache, or read now and put there; None where these rows cannot be cached."""
    before = _state_of(source)
    key = entry_key(Path(source), config, chat_format)
    if key is None:
        return None
    entry = cache.find(key)
    if entry is None:
        reading = _read(source, config, chat_format, workers)
        rows = reading.columns.count("lengths")
        unchanged = _state_of(source) == before
        if rows >= cache.min_rows and unchanged:
            entry = cache.store(key, reading.facts.to_json(), reading.columns.blocks())
        if entry is None:
            return reading.settled()
    return (_Facts.from_json(entry.facts), *_of_columns(entry.columns))


def _read(source: str, config: DataConfig, chat_format: ChatFormat, workers: int | None) -> _Reading:
    rows = _Rows(_open(source), config)
    finder = Finder(chat_format.tokenizer.special_tokens, chat_format.role_markers)
    columns = GrowingColumns()
    columns.add(conversation_columns(()) | FlatRows.of(()).columns())
    refused: list[BadRow] = []
    with closing(encode_chunks(rows.chunks(), chat_format, workers=workers)) as encoded:
        for chunk, found in encoded:
            good = [chunk[index] for index in found.kept]
            refused += found.bad_rows
            finder.add(good)
            columns.add(conversation_columns(good) | found.rows.columns())
    conversations = Conversations.from_columns(columns.join())
    findings = finder.findings(conversations)
    bad_rows = (*rows.bad_rows, *refused)
    return _Reading(_Facts(rows.detection, bad_rows, dict(rows.ignored), rows.typos, findings), columns)


def _of_columns(columns: dict[str, Any]) -> tuple[Conversations, Examples]:
    return Conversations.from_columns(columns), Examples.from_columns(columns)


class _Rows:
    """The rows of a source as conversations; what was odd about them is known once they have all passed."""

    def __init__(self, rows: Iterator[Row], config: DataConfig) -> None:
        self._first = list(_until_records(rows, _DETECTION_ROWS))
        self._rest = rows
        self.detection = _detect([row for row in self._first if isinstance(row, Record)], config)
        self._rules = RowRules(self.detection.format, config.columns, config.system, config.input_separator)
        self.bad_rows: list[BadRow] = []
        self.ignored: Counter[str] = Counter()
        self.typos = 0

    def chunks(self) -> Iterator[list[Conversation]]:
        chunk: list[Conversation] = []
        for row in chain(self._first, self._rest):
            read = self._conversation(row)
            if isinstance(read, BadRow):
                self.bad_rows.append(read)
            else:
                chunk.append(read)
            if len(chunk) == CHUNK:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    def _conversation(self, row: Row) -> Conversation | BadRow:
        if isinstance(row, BadRow):
            return row
        self.ignored.update(unread_columns(row, self._rules))
        if TYPO in row.fields:
            self.typos += self.detection.format == "alpaca" and "instruction" not in row.fields
        return to_conversation(row, self._rules)


def _until_records(rows: Iterator[Row], count: int) -> Iterator[Row]:
    """Rows until `count` of them are readable; a file may begin with many that are not."""
    seen = 0
    while seen < count:
        row = next(rows, None)
        if row is None:
            return
        seen += isinstance(row, Record)
        yield row


def _detect(records: Sequence[Record], config: DataConfig) -> Detection:
    if config.format != "auto":
        return Detection(config.format, "as told")
    return detect_format(records, config.columns) if records else Detection("auto", "no row can be read")


def _require_source(source: str) -> None:
    if not source:
        raise ConfigError("data.train names no rows", fix="--data FILE, or data.train in the recipe")


def _is_file(source: str) -> bool:
    looks_like_file = os.path.exists(source) or any(kind in Path(source).suffixes for kind in KINDS)
    return looks_like_file or not _HUB_NAME.fullmatch(source)


def _open(source: str) -> Iterator[Row]:
    return read_records(Path(source)) if _is_file(source) else _read_hub(source)


def _state_of(source: str) -> tuple[int, int, int] | None:
    """What changes when somebody writes to the file while it is read."""
    try:
        status = Path(source).stat()
    except (OSError, ValueError):  # a name too long, or with a zero byte: reading it says so
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _read_hub(name: str) -> Iterator[Row]:
    try:
        import datasets
    except ImportError:
        raise SetupError(
            f"there is no file {name}, and reading it as a hub data set needs the package datasets",
            why="it is an optional extra",
            fix="check the path, or: pip install 'lorasmith[hub-datasets]'",
        ) from None
    try:
        table = datasets.load_dataset(name, split="train")
    except (OSError, ValueError) as error:
        fix = "check the name and the network, or download its file and name that"
        raise SetupError(f"cannot get the hub data set {name}", why=str(error), fix=fix) from None
    return table_rows(table, name, DEFAULT_LIMITS)
