"""`lorasmith data check | stats | preview`: what the screen and --json show, and the exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from character_chat import SPECIAL, CharacterChat
from typer.testing import CliRunner, Result

import lorasmith
from lorasmith.cli import data as verbs
from lorasmith.cli import data_view
from lorasmith.errors import ConfigError, DataError
from lorasmith.types import IGNORE_INDEX, Example

ROWS = [{"instruction": "你是谁？", "output": "甄嬛。"}, {"instruction": "a\nb", "output": "c" * 30}]


@pytest.fixture(autouse=True)
def _character_model(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every model directory speaks in characters and has no limit of its own."""
    directory = tmp_path_factory.mktemp("model")
    (directory / "config.json").write_text("{}")
    root = SimpleNamespace(
        load_chat_format=lambda path, *, family, chat_format, hub: CharacterChat(),
        download=lambda path, *, hub: directory,
    )
    monkeypatch.setattr(lorasmith, "api", root, raising=False)
    monkeypatch.setitem(sys.modules, "lorasmith.api", root)  # type: ignore[arg-type]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write(tmp_path / "rows.jsonl", ROWS)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def run(verb: str, file: Path, *flags: str) -> Result:
    return CliRunner().invoke(verbs.app, [verb, str(file), "--model", "m", *flags])


def test_check_of_good_rows_exits_0(rows: Path) -> None:
    result = run("check", rows)
    assert result.exit_code == 0
    assert "2 rows, 2 can be trained on" in result.output
    assert "format alpaca (its rows have 'instruction' and 'output')" in result.output
    assert "nothing odd" in result.output


def test_check_names_each_bad_row_and_exits_3(tmp_path: Path) -> None:
    bad = write(tmp_path / "rows.jsonl", [*ROWS, {"instruction": "q", "output": 5}])
    result = run("check", bad)
    assert result.exit_code == DataError.exit_code
    assert "wrong-type: 1" in result.output
    assert "rows.jsonl:3  output = 5" in result.output
    assert json.loads(run("check", bad, "--json").output)["bad_rows"][0]["origin"] == "rows.jsonl:3"
    assert run("check", bad, "--on-bad-row", "skip").exit_code == 0


def test_check_names_rows_over_the_limit(rows: Path) -> None:
    result = run("check", rows, "--max-length", "20")
    assert result.exit_code == DataError.exit_code
    assert "rows.jsonl:2  35 tokens" in result.output
    assert run("check", rows, "--max-length", "20", "--over-length", "drop").exit_code == 0


def test_check_shows_as_many_rows_as_told(tmp_path: Path) -> None:
    bad = write(tmp_path / "rows.jsonl", [*ROWS, *[{"instruction": "q", "output": ""}] * 5])
    result = run("check", bad, "-n", "2")
    assert "rows.jsonl:4" in result.output
    assert "rows.jsonl:5" not in result.output
    assert "and 3 more" in result.output


def test_stats_shows_lengths_and_the_trained_share(rows: Path) -> None:
    result = run("stats", rows, "-n", "1")
    assert result.exit_code == 0
    assert "2 conversations, 44 tokens" in result.output
    assert "35 are trained" in result.output
    assert "longest: rows.jsonl:2 (35)" in result.output
    machine = json.loads(run("stats", rows, "--json").output)
    assert (machine["total"], machine["supervised"], machine["conversations"]) == (44, 35, 2)


def test_stats_without_a_good_row_is_a_data_error(tmp_path: Path) -> None:
    result = run("stats", write(tmp_path / "rows.jsonl", [{"instruction": "q", "output": ""}]))
    assert isinstance(result.exception, DataError)


def test_preview_shows_the_first_rows_with_their_origin(rows: Path) -> None:
    result = run("preview", rows, "-n", "1")
    assert "rows.jsonl:1  9 tokens, 4 trained" in result.output
    assert "<|bos|>你是谁？<|assistant|>甄嬛。<|end|>" in result.output
    assert "rows.jsonl:2" not in result.output
    shown = json.loads(run("preview", rows, "--json").output)["rows"][1]
    assert shown["tokens"][:4] == ["<|bos|>", "a", "\n", "b"]
    assert shown["labels"][:4] == [IGNORE_INDEX] * 4


def test_preview_shows_a_truncated_row_as_it_is_trained(rows: Path) -> None:
    result = run("preview", rows, "--max-length", "10", "--over-length", "truncate")
    assert result.exit_code == 0
    assert "rows.jsonl:2  10 tokens, 6 trained" in result.output


def test_stats_counts_rows_over_the_limit(rows: Path) -> None:
    result = run("stats", rows, "--max-length", "20")
    assert result.exit_code == DataError.exit_code
    assert "over 20 tokens: 1 rows" in result.output


def test_preview_colours_tokens_by_what_is_trained() -> None:
    a, b, c = (ord(letter) + len(SPECIAL) for letter in "abc")
    labels = np.array([b, IGNORE_INDEX, SPECIAL["<|end|>"]])
    line = data_view.preview_row(Example(np.array([a, b, c]), labels, "f:1"), CharacterChat())
    spans = [(line.plain[span.start : span.end], span.style) for span in line.spans[1:]]
    assert spans == [("a", "dim"), ("b", "bold green"), ("c", "dim"), ("<|end|>", "bold green")]


def test_preview_shows_a_target_that_replaces_the_token_in_its_place() -> None:
    a, b, c = (ord(letter) + len(SPECIAL) for letter in "abc")
    labels = np.array([SPECIAL["<|end|>"], c, IGNORE_INDEX])
    line = data_view.preview_row(Example(np.array([a, b, c]), labels, "f:1"), CharacterChat())
    assert ("<|end|>", "bold yellow") in [(line.plain[s.start : s.end], s.style) for s in line.spans]


def test_line_breaks_are_visible(rows: Path) -> None:
    assert "a⏎\nb" in run("preview", rows).output


def test_columns_are_named_on_the_command_line(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [{"question": "q", "reply": "a"}])
    assert run("check", file, "--column", "instruction=question", "--column", "output=reply").exit_code == 0
    assert isinstance(run("check", file, "--column", "question").exception, ConfigError)
    assert isinstance(run("check", file, "--format", "alpacca").exception, ConfigError)
