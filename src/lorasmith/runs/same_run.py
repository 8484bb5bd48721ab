"""Whether a resume continues the same run: what changed since its checkpoint, as a table, and what may."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasmith.batching.fingerprint import fingerprint, row_hashes
from lorasmith.config import RunConfig
from lorasmith.errors import CheckpointError, ConfigError
from lorasmith.json_file import read_object
from lorasmith.types import Example

ROWS_FILE = "rows.json"
NOT_THE_RESULT = {
    "output_dir",
    "max_tokens",
    "static_rows",
    "activation_checkpointing",
    "max_skipped_steps",
    "golden_rows",
    "logging_steps",
    "save_steps",
    "save_total_limit",
}
"""Keys of TrainConfig that a resume may change: they do not touch the adapter that comes out."""
_SHAPE = "the adapter's tensors would have other shapes or names"
_START = "it says how the adapter began, which is past"
_FIXED = {
    "lora.r": _SHAPE,
    "lora.target_modules": _SHAPE,
    "lora.modules_to_save": _SHAPE,
    "lora.use_dora": _SHAPE,
    "lora.init_lora_weights": _START,
    "lora.init_from": _START,
}
"""Settings that no override lets a resume change, and why."""
_HASH = 8
"""Hexadecimal digits of a row's hash."""
_CELL = 60
"""Characters of a value in the table."""
_INDENT = "\n         "
"""Puts a line under the first one of an error's why."""


@dataclass(frozen=True)
class RowHashes:
    """The training rows, as a run keeps them to say later which one became another."""

    fingerprint: str
    """sha256 of all of them, in order."""
    hashes: tuple[str, ...]
    """CRC-32 of the ids and labels of each, as 8 hexadecimal digits."""
    origins: tuple[str, ...] = ()
    """file:line of each, where they are known."""

    @classmethod
    def of(cls, examples: Sequence[Example]) -> RowHashes:
        origins = tuple(example.origin for example in examples)
        return cls(fingerprint(examples), row_hashes(examples), origins)

    def to_json(self) -> bytes:
        tree = {"rows": len(self.hashes), "sha256": self.fingerprint, "crc32": "".join(self.hashes)}
        return (json.dumps(tree, indent=2) + "\n").encode()

    @classmethod
    def read(cls, run_dir: Path) -> RowHashes | None:
        """None where the file is absent or no longer what was written: it only serves to tell."""
        try:
            tree = read_object(run_dir / ROWS_FILE)
            text = str(tree["crc32"])
            hashes = tuple(text[i : i + _HASH] for i in range(0, len(text), _HASH))
            return cls(str(tree["sha256"]), hashes)
        except (OSError, ValueError, KeyError, TypeError):
            return None


@dataclass(frozen=True)
class Change:
    """A thing that the adapter depends on, and that is another than when the checkpoint was written."""

    key: str
    was: Any
    now: Any


def changes_since(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """`then` and `now` as `TrainState.depends_on`. A key that `then` does not have was at its default."""
    defaults = _defaults()
    pairs = ((key, then.get(key, defaults.get(key)), value) for key, value in now.items())
    return [Change(key, was, value) for key, was, value in pairs if was != value]


def require_known(allowed: Sequence[str]) -> None:
    """Raises: ConfigError for an override that names nothing, or what cannot change within a run."""
    known = [
        "data",
        "held_out",
        "base",
        "model.dtype",
        *(k for k in _defaults() if k.startswith(("lora.", "train."))),
    ]
    for key in allowed:
        if key in _FIXED:
            raise ConfigError(
                f"{key} cannot change within a run",
                where="--allow-change",
                why=_FIXED[key],
                fix="choose a new train.output_dir; lora.init_from begins at an adapter you have",
            )
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            section = {"data": "data", "model": "base"}.get(key.partition(".")[0])
            meant = section or (near[0] if near else None)
            raise ConfigError(
                f"there is no change called {key}",
                where="--allow-change",
                fix=f"did you mean {meant}?" if meant else "name a key of the config, or data, or base",
            )


def require_same_run(
    changes: Sequence[Change], allowed: Sequence[str], checkpoint: Path, rows: RowHashes
) -> None:
    """Raises: CheckpointError that shows every change that `allowed` does not name."""
    refused = [change for change in changes if change.key not in allowed]
    if not refused:
        return
    names = ", ".join(change.key for change in refused)
    fixed = [change.key for change in refused if change.key in _FIXED]
    before = RowHashes.read(checkpoint.parents[1])
    raise CheckpointError(
        f"this checkpoint belongs to another run: {names} changed",
        where=str(checkpoint),
        why=_INDENT.join(_table([_row(change, before, rows) for change in refused])),
        fix=_INDENT.join(_remedies(refused, fixed)),
    )


def _remedies(refused: Sequence[Change], fixed: Sequence[str]) -> list[str]:
    if fixed:
        reasons = "; ".join(f"{key} cannot change within a run: {_FIXED[key]}" for key in fixed)
        return ["resume with what it was started with, or choose a new train.output_dir", f"({reasons})"]
    flags = " ".join(f"--allow-change {change.key}" for change in refused)
    return [
        "resume with what it was started with, or choose a new train.output_dir;",
        f"if the change is meant: {flags}",
    ]


def _row(change: Change, before: RowHashes | None, rows: RowHashes) -> tuple[str, str, str]:
    if change.key == "data":
        was, now = _data_told(change, before, rows)
        return "data", was, now
    if change.key in ("held_out", "base"):
        return change.key, _fingerprint_told(change.was), _fingerprint_told(change.now)
    return (change.key, _cell(change.was), _cell(change.now))


def _data_told(change: Change, before: RowHashes | None, now: RowHashes) -> tuple[str, str]:
    if before is None or before.fingerprint != change.was:
        return _fingerprint_told(change.was), f"{len(now.hashes):,} rows, {_short(change.now)}"
    pairs = enumerate(zip(before.hashes, now.hashes, strict=False))
    shorter = min(len(before.hashes), len(now.hashes))
    first = next((n for n, (old, new) in pairs if old != new), shorter)
    place = f" ({now.origins[first]})" if first < len(now.origins) else ""
    return (
        f"{len(before.hashes):,} rows",
        f"{len(now.hashes):,} rows; the first that differs: {first + 1}{place}",
    )


def _table(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    titled = [("key", "was", "now"), *rows]
    widths = [max(len(row[column]) for row in titled) for column in range(2)]
    return [f"{key:<{widths[0]}}  {was:<{widths[1]}}  {now}" for key, was, now in titled]


def _cell(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _CELL else f"{text[: _CELL - 3]}..."


def _fingerprint_told(fingerprint: Any) -> str:
    return "none" if fingerprint is None else f"fingerprint {_short(fingerprint)}"


def _short(fingerprint: Any) -> str:
    return str(fingerprint)[:12]


def _defaults() -> dict[str, Any]:
    tree = RunConfig().model_dump()
    return {f"{section}.{key}": value for section, keys in tree.items() for key, value in keys.items()}
