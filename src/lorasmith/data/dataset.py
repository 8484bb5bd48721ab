"""A data source -> the examples to train on, those held out, and the report of what happened on the way."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from lorasmith.batching.columns import Conversations, Examples
from lorasmith.batching.fingerprint import fingerprint
from lorasmith.config import DataConfig
from lorasmith.data.check import DataReport
from lorasmith.data.encode import EncodeResult, fit_length
from lorasmith.data.survey import Survey, survey
from lorasmith.errors import DataError
from lorasmith.files.links import refuse_links
from lorasmith.rows.findings import prompt_of
from lorasmith.rows.records import bad_rows_error
from lorasmith.storage import Storage
from lorasmith.text.template import ChatFormat
from lorasmith.types import Conversation, Example, Ints, Message


@dataclass(frozen=True, eq=False)
class Dataset(Sequence[Example]):
    """The examples to train on, in the order of their rows; `conversations[i]` became `examples[i]`."""

    examples: Examples
    conversations: Conversations
    held_out: Examples
    held_out_conversations: Conversations
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
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Example | Examples:
        return self.examples[index]

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.examples)


def load(
    config: DataConfig,
    chat_format: ChatFormat,
    *,
    model_max_length: int | None = None,
    rejects_path: Path | None = None,
    storage: Storage | None = None,
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
    _settle_bad_rows(reports, config, rejects_path, storage or Storage())
    training, held_out = surveys if len(surveys) == 2 else _split_survey(surveys[0], config.eval)
    train_fit = _fit(training, max_length, config, purpose="train on")
    nothing = training.examples.take(np.arange(0))
    held_fit = (
        _fit(held_out, max_length, config, purpose="hold out")
        if held_out
        else EncodeResult(nothing, np.arange(0))
    )
    return Dataset(
        examples=train_fit.examples,
        conversations=training.conversations.take(train_fit.kept),
        held_out=held_fit.examples,
        held_out_conversations=(held_out or training).conversations.take(held_fit.kept),
        report=reports[0],
        config=config,
        eval_report=reports[1] if len(reports) == 2 else None,
        dropped=train_fit.dropped + held_fit.dropped,
        truncated=train_fit.truncated + held_fit.truncated,
        warnings=_beyond_model(config.max_length, model_max_length)
        + _warnings(reports, _leaked(training, held_out), train_fit, held_fit),
    )


def split(conversations: Sequence[Conversation], fraction: float) -> tuple[Ints, Ints]:
    """Row numbers (to train on, held out). The side is a hash of the prompt: equal prompts share it, whatever
    the order of rows.

    Raises: DataError if `fraction` is above 0 and a side stays empty.
    """
    is_held_out = _hash_shares(conversations) < fraction
    training, held_out = np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
    if fraction and not (len(training) and len(held_out)):
        raise DataError(
            f"a share of {fraction} leaves no rows to {'train on' if len(held_out) else 'hold out'}",
            why=f"{len(conversations):,} rows, split by hash of their prompt: small sets split unevenly",
            fix="choose another data.eval share, or name a file of held-out rows",
        )
    return training, held_out


def _split_survey(rows: Survey, share: float | str | None) -> tuple[Survey, Survey | None]:
    if not isinstance(share, float | int) or not share:
        return rows, None
    training, held_out = (
        replace(rows, conversations=rows.conversations.take(side), examples=rows.examples.take(side))
        for side in split(rows.conversations, share)
    )
    return training, held_out


def _settle_bad_rows(
    reports: Sequence[DataReport], config: DataConfig, rejects_path: Path | None, storage: Storage
) -> None:
    bad_rows = [row for report in reports for row in report.bad_rows]
    if bad_rows and config.on_bad_row == "error":
        raise bad_rows_error(bad_rows, sum(report.rows for report in reports))
    if bad_rows and rejects_path is not None:
        lines = [json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in bad_rows]
        refuse_links(rejects_path.parent, [rejects_path.name])
        storage.make_dir(rejects_path.parent)
        # A lone surrogate has no UTF-8: it stays the escape that JSON has for it.
        storage.replace(rejects_path, "".join(lines).encode(errors="backslashreplace"))


def _fit(side: Survey, max_length: int | None, config: DataConfig, purpose: str) -> EncodeResult:
    fit = fit_length(side.examples, max_length, config.over_length)
    if not fit.examples:
        why = f"{len(fit.dropped):,} are over the length limit" if fit.dropped else "all its rows are bad"
        fix = "raise data.max_length, or repair the rows that lorasmith data check names"
        raise DataError(f"{side.report.source} has no rows left to {purpose}", why=why, fix=fix)
    return fit


def _leaked(training: Survey, held_out: Survey | None) -> list[str]:
    """The held-out rows whose prompt is also trained on; only a held-out file of its own can have any."""
    if held_out is None:
        return []
    known = np.isin(_hash_shares(held_out.conversations), _hash_shares(training.conversations))
    return list(held_out.examples.origins(np.flatnonzero(known)))


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


def _hash_shares(conversations: Sequence[Conversation]) -> NDArray[np.float64]:
    return np.fromiter(map(_hash_share, conversations), np.float64, len(conversations))


def _hash_share(conversation: Conversation) -> float:
    """A number in [0, 1) that depends on nothing but the prompt."""
    prompt = [(message.role, _normal(message)) for message in prompt_of(conversation)]
    digest = hashlib.sha256(json.dumps(prompt).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _normal(message: Message) -> str:
    return unicodedata.normalize("NFC", message.content).strip()
