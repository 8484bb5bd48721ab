"""A data source -> the examples to train on, those held out, and the report of what happened on the way."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import overload
from zlib import crc32

from lorasmith.config import DataConfig
from lorasmith.data.check import DataReport, describe, find, over_length_rows, prompt_of, token_stats
from lorasmith.data.conversation import (
    TYPO,
    Detection,
    RowRules,
    check_columns,
    detect_format,
    to_conversation,
    unread_columns,
)
from lorasmith.data.encode import EncodeResult, encode_or_refuse, fit_length
from lorasmith.data.records import KINDS, BadRow, Record, Row, bad_rows_error, read_records, table_rows
from lorasmith.data.source import DEFAULT_LIMITS
from lorasmith.errors import ConfigError, DataError, SetupError, StorageError
from lorasmith.text.template import ChatFormat
from lorasmith.types import Conversation, Example, Message

_DETECTION_ROWS = 200
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, eq=False)
class Dataset(Sequence[Example]):
    """The examples to train on, in the order of their rows; `conversations[i]` became `examples[i]`."""

    examples: tuple[Example, ...]
    conversations: tuple[Conversation, ...]
    held_out: tuple[Example, ...]
    held_out_conversations: tuple[Conversation, ...]
    report: DataReport
    config: DataConfig
    """How it was loaded: a run records it, and chat takes its system prompt."""
    eval_report: DataReport | None = None
    """Where the held-out rows are a file of their own."""
    dropped: tuple[str, ...] = ()
    truncated: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Example, ...]: ...
    def __getitem__(self, index: int | slice) -> Example | tuple[Example, ...]:
        return self.examples[index]

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.examples)


@dataclass(frozen=True)
class Survey:
    """A source, read and encoded, before anything is decided: `examples[i]` is `conversations[i]`, uncut."""

    report: DataReport
    conversations: tuple[Conversation, ...]
    examples: tuple[Example, ...]


def load(
    config: DataConfig,
    chat_format: ChatFormat,
    *,
    model_max_length: int | None = None,
    rejects_path: Path | None = None,
) -> Dataset:
    """The whole way: read, check, encode, hold out, fit to the length limit.

    Raises: DataError naming the rows, if there are bad ones (unless `on_bad_row="skip"`, which writes them to
    `rejects_path`), too long ones (unless `over_length` says otherwise), or none left; SetupError where an
    extra is missing; StorageError if the rejects cannot be written.
    """
    max_length = config.max_length or model_max_length
    sources = [config.train, config.eval] if isinstance(config.eval, str) else [config.train]
    surveys = [survey(source, config, chat_format, max_length=max_length) for source in sources]
    reports = [found.report for found in surveys]
    _settle_bad_rows(reports, config, rejects_path)
    training, held_out = surveys if len(surveys) == 2 else _split_survey(surveys[0], config.eval)
    train_fit = _fit(training, max_length, config, purpose="train on")
    held_fit = _fit(held_out, max_length, config, purpose="hold out") if held_out else EncodeResult(())
    return Dataset(
        examples=train_fit.examples,
        conversations=_still_there(training, train_fit),
        held_out=held_fit.examples,
        held_out_conversations=_still_there(held_out, held_fit) if held_out else (),
        report=reports[0],
        config=config,
        eval_report=reports[1] if len(reports) == 2 else None,
        dropped=train_fit.dropped + held_fit.dropped,
        truncated=train_fit.truncated + held_fit.truncated,
        warnings=_beyond_model(config.max_length, model_max_length)
        + _warnings(reports, _leaked(training, held_out), train_fit, held_fit),
    )


def survey(
    source: str, config: DataConfig, chat_format: ChatFormat, *, max_length: int | None = None
) -> Survey:
    """Everything there is to know about a source. Bad rows are in the report and raise nothing.

    Raises: DataError if the source as a whole cannot be read or its format is unclear.
    """
    rows = _read(source, config)
    encoded = list(encode_or_refuse(rows.conversations, chat_format))
    good = [(c, e) for c, e in zip(rows.conversations, encoded, strict=True) if isinstance(e, Example)]
    conversations = tuple(conversation for conversation, _ in good)
    examples = tuple(example for _, example in good)
    bad_rows = (*rows.bad_rows, *(row for row in encoded if isinstance(row, BadRow)))
    findings = find(conversations, chat_format.tokenizer.special_tokens, chat_format.role_markers)
    report = DataReport(
        source=source,
        format=rows.detection.format,
        format_reason=rows.detection.reason,
        rows=len(conversations) + len(bad_rows),
        conversations=len(conversations),
        bad_rows=bad_rows,
        ignored_columns=dict(rows.ignored),
        findings=findings,
        tokens=token_stats(examples),
        max_length=max_length,
        over_length=over_length_rows(examples, max_length),
        warnings=describe(findings, rows.ignored, rows.typos),
    )
    return Survey(report, conversations, examples)


def split(
    conversations: Sequence[Conversation], fraction: float
) -> tuple[list[Conversation], list[Conversation]]:
    """(train, held out). The side is a hash of the prompt, so equal prompts share it, in any order of rows.

    Raises: DataError if `fraction` is above 0 and a side stays empty.
    """
    held_out = [conversation for conversation in conversations if _hash_share(conversation) < fraction]
    training = [conversation for conversation in conversations if _hash_share(conversation) >= fraction]
    if fraction and not (training and held_out):
        raise DataError(
            f"a share of {fraction} leaves no rows to {'train on' if held_out else 'hold out'}",
            why=f"{len(conversations):,} rows, split by hash of their prompt: small sets split unevenly",
            fix="choose another data.eval share, or name a file of held-out rows",
        )
    return training, held_out


def fingerprint(examples: Iterable[Example]) -> str:
    """sha256 of the ids and labels, in order: equal for equal training data, on any machine."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example).to_bytes(8, "little"))
        digest.update(example.input_ids.astype("<i8").tobytes() + example.labels.astype("<i8").tobytes())
    return digest.hexdigest()


def row_hashes(examples: Iterable[Example]) -> tuple[str, ...]:
    """CRC-32 of the ids and labels of each, as 8 hexadecimal digits: to name the row that changed."""
    crcs = (
        crc32(e.labels.astype("<i8").tobytes(), crc32(e.input_ids.astype("<i8").tobytes())) for e in examples
    )
    return tuple(f"{crc:08x}" for crc in crcs)


@dataclass(frozen=True)
class _Rows:
    conversations: list[Conversation]
    bad_rows: list[BadRow]
    detection: Detection
    ignored: Counter[str] = field(default_factory=Counter)
    typos: int = 0


def _read(source: str, config: DataConfig) -> _Rows:
    rows = _open(source)
    first = list(_until_records(rows, _DETECTION_ROWS))
    detection = _detect([row for row in first if isinstance(row, Record)], config)
    rules = RowRules(detection.format, config.columns, config.system, config.input_separator)
    conversations: list[Conversation] = []
    bad_rows: list[BadRow] = []
    ignored: Counter[str] = Counter()
    typos = 0
    for row in chain(first, rows):
        read = to_conversation(row, rules) if isinstance(row, Record) else row
        if isinstance(row, Record):
            ignored.update(unread_columns(row, rules))
            typos += detection.format == "alpaca" and TYPO in row.fields and "instruction" not in row.fields
        if isinstance(read, BadRow):
            bad_rows.append(read)
        else:
            conversations.append(read)
    return _Rows(conversations, bad_rows, detection, ignored, typos)


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
    check_columns(config.columns)
    if config.format != "auto":
        return Detection(config.format, "as told")
    return detect_format(records, config.columns) if records else Detection("auto", "no row can be read")


def _open(source: str) -> Iterator[Row]:
    if not source:
        raise ConfigError("data.train names no rows", fix="--data FILE, or data.train in the recipe")
    path = Path(source)
    looks_like_file = path.exists() or any(kind in path.suffixes for kind in KINDS)
    if looks_like_file or not _HUB_NAME.fullmatch(source):
        return read_records(path)
    return _read_hub(source)


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


def _split_survey(rows: Survey, share: float | str | None) -> tuple[Survey, Survey | None]:
    if not isinstance(share, float | int) or not share:
        return rows, None
    _, held_out = split(rows.conversations, share)
    side = {conversation.origin for conversation in held_out}
    pairs = list(zip(rows.conversations, rows.examples, strict=True))
    parts = [[pair for pair in pairs if (pair[1].origin in side) == held] for held in (False, True)]
    training, held_part = (
        replace(rows, conversations=tuple(row for row, _ in part), examples=tuple(e for _, e in part))
        for part in parts
    )
    return training, held_part


def _settle_bad_rows(reports: Sequence[DataReport], config: DataConfig, rejects_path: Path | None) -> None:
    bad_rows = [row for report in reports for row in report.bad_rows]
    if bad_rows and config.on_bad_row == "error":
        raise bad_rows_error(bad_rows, sum(report.rows for report in reports))
    if bad_rows and rejects_path is not None:
        lines = [json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in bad_rows]
        try:
            rejects_path.parent.mkdir(parents=True, exist_ok=True)
            rejects_path.write_text("".join(lines), encoding="utf-8")
        except OSError as error:
            fix = "free space there, or choose another output directory"
            raise StorageError(f"cannot write {rejects_path}", why=str(error.strerror), fix=fix) from None


def _fit(side: Survey, max_length: int | None, config: DataConfig, purpose: str) -> EncodeResult:
    fit = fit_length(side.examples, max_length, config.over_length)
    if not fit.examples:
        why = f"{len(fit.dropped):,} are over the length limit" if fit.dropped else "all its rows are bad"
        fix = "raise data.max_length, or repair the rows that lorasmith data check names"
        raise DataError(f"{side.report.source} has no rows left to {purpose}", why=why, fix=fix)
    return fit


def _still_there(side: Survey, fit: EncodeResult) -> tuple[Conversation, ...]:
    dropped = set(fit.dropped)
    return tuple(conversation for conversation in side.conversations if conversation.origin not in dropped)


def _leaked(training: Survey, held_out: Survey | None) -> list[str]:
    """The held-out rows whose prompt is also trained on; only a held-out file of its own can have any."""
    known = {_hash_share(conversation) for conversation in training.conversations} if held_out else set()
    return [row.origin for row in held_out.conversations if _hash_share(row) in known] if held_out else []


def _beyond_model(asked: int | None, model_max_length: int | None) -> tuple[str, ...]:
    if asked is None or model_max_length is None or asked <= model_max_length:
        return ()
    return (f"max_length {asked:,} is above the model's own {model_max_length:,} positions",)


def _warnings(reports: Sequence[DataReport], leaked: Sequence[str], *fits: EncodeResult) -> tuple[str, ...]:
    lines = [line for report in reports for line in report.warnings]
    touched = [
        ([row.origin for report in reports for row in report.bad_rows], "bad rows left out"),
        ([origin for fit in fits for origin in fit.dropped], "rows dropped for their length"),
        ([origin for fit in fits for origin in fit.truncated], "rows truncated"),
        (leaked, "held-out rows whose prompt is also trained on"),
    ]
    for origins, what in touched:
        if origins:
            more = ", ..." if len(origins) > 3 else ""
            lines.append(f"{len(origins):,} {what}: {', '.join(origins[:3])}{more}")
    return tuple(lines)


def _hash_share(conversation: Conversation) -> float:
    """A number in [0, 1) that depends on nothing but the prompt."""
    prompt = [(message.role, _normal(message)) for message in prompt_of(conversation)]
    digest = hashlib.sha256(json.dumps(prompt).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _normal(message: Message) -> str:
    return unicodedata.normalize("NFC", message.content).strip()
