"""What a changed resume is told, without a model: the table, the remedies, the row that became another."""

from __future__ import annotations

from pathlib import Path

import pytest
from modules import examples

from lorasmith.batching.fingerprint import fingerprint, row_hashes
from lorasmith.errors import CheckpointError, ConfigError
from lorasmith.runs.same_run import (
    ROWS_FILE,
    Change,
    RowHashes,
    changes_since,
    require_known,
    require_same_run,
)


def hashes_of(rows, origins=()) -> RowHashes:
    return RowHashes(fingerprint(rows), row_hashes(rows), origins)


def refusal(tmp_path: Path, *changes: Change, rows: RowHashes | None = None) -> str:
    checkpoint = tmp_path / "checkpoints/step-000009"
    with pytest.raises(CheckpointError) as caught:
        require_same_run(changes, (), checkpoint, rows or hashes_of(examples(3)))
    return str(caught.value)


def test_settings_are_a_table_and_the_remedy_names_each() -> None:
    text = refusal(Path("run"), Change("train.seed", 0, 12), Change("train.lr_scheduler", "cosine", "linear"))
    assert text.splitlines() == [
        "this checkpoint belongs to another run: train.seed, train.lr_scheduler changed",
        "  where: run/checkpoints/step-000009",
        "  why:   key                 was       now",
        "         train.seed          0         12",
        '         train.lr_scheduler  "cosine"  "linear"',
        "  do:    resume with what it was started with, or choose a new train.output_dir;",
        "         if the change is meant: --allow-change train.seed --allow-change train.lr_scheduler",
    ]


def test_a_long_value_is_cut_in_the_table() -> None:
    text = refusal(Path("run"), Change("train.seed", "x" * 500, 1))
    assert max(map(len, text.splitlines())) < 120


def test_a_shape_cannot_be_allowed() -> None:
    text = refusal(Path("run"), Change("lora.r", 8, 4), Change("train.seed", 0, 1))
    assert "lora.r cannot change within a run: the adapter's tensors would have other shapes" in text
    assert "--allow-change" not in text
    with pytest.raises(ConfigError, match=r"lora\.r cannot change within a run"):
        require_known(["lora.r"])


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("train.learning_rat", "train.learning_rate"),
        ("data.train", "data"),
        ("model.path", "base"),
        ("?", None),
    ],
)
def test_an_override_that_names_nothing_is_refused(key: str, meant: str | None) -> None:
    with pytest.raises(ConfigError, match="there is no change called") as caught:
        require_known([key])
    assert caught.value.fix == (
        f"did you mean {meant}?" if meant else "name a key of the config, or data, or base"
    )


def test_known_overrides_pass() -> None:
    require_known(
        ["data", "base", "model.dtype", "train.learning_rate", "train.max_tokens", "lora.lora_alpha"]
    )


def test_the_first_row_that_became_another_is_named(tmp_path: Path) -> None:
    before = examples(5)
    after = [*before[:2], *examples(3, seed=9)]
    (tmp_path / ROWS_FILE).write_bytes(hashes_of(before).to_json())
    now = hashes_of(after, tuple(f"rows.jsonl:{n}" for n in range(1, 6)))
    text = refusal(tmp_path, Change("data", fingerprint(before), now.fingerprint), rows=now)
    assert "data  5 rows  5 rows; the first that differs: 3 (rows.jsonl:3)" in text
    assert "--allow-change data" in text


def test_rows_that_were_added_or_taken_are_counted(tmp_path: Path) -> None:
    rows = examples(5)
    (tmp_path / ROWS_FILE).write_bytes(hashes_of(rows[:3]).to_json())
    change = Change("data", fingerprint(rows[:3]), fingerprint(rows))
    assert "3 rows  5 rows; the first that differs: 4" in refusal(tmp_path, change, rows=hashes_of(rows))


@pytest.mark.parametrize(
    "content", [None, b"not json", b"[]", b'{"rows": 1}', b'{"sha256": "0", "crc32": ""}']
)
def test_without_a_record_of_rows_fingerprints_are_told(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / ROWS_FILE).write_bytes(content)
    text = refusal(tmp_path, Change("data", "a" * 64, "b" * 64), Change("base", "c" * 64, "d" * 64))
    assert "data  fingerprint aaaaaaaaaaaa  3 rows, bbbbbbbbbbbb" in text
    assert "base  fingerprint cccccccccccc  fingerprint dddddddddddd" in text


def test_the_record_of_rows_comes_back(tmp_path: Path) -> None:
    rows = hashes_of(examples(4))
    (tmp_path / ROWS_FILE).write_bytes(rows.to_json())
    assert RowHashes.read(tmp_path) == rows


def test_a_key_that_the_run_did_not_know_was_at_its_default() -> None:
    now = {"train.share_prefixes": True, "train.seed": 3, "data": "x"}
    assert changes_since({"train.seed": 3, "data": "x"}, now) == []
    changed = changes_since({"train.seed": 3, "data": "x"}, {**now, "train.share_prefixes": False})
    assert changed == [Change("train.share_prefixes", True, False)]
