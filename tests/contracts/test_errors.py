"""An error a user can meet: its exit code, and how the command line tells it."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import tokenizers_factory

from lorasmith import errors
from lorasmith.doctor.check import Check

EXIT_CODES = {
    "ConfigError": 2,
    "FamilyError": 2,
    "DataError": 3,
    "SetupError": 4,
    "TokenizerError": 4,
    "CheckpointError": 4,
    "MemoryLimitError": 5,
    "DivergedError": 6,
    "NotReproducedError": 6,
    "StorageError": 7,
    "Interrupted": 130,
    "Terminated": 143,
    "Preempted": 75,
}
BUILT_IN = {
    "ConfigError": ValueError,
    "DataError": ValueError,
    "MemoryLimitError": MemoryError,
    "DivergedError": ArithmeticError,
    "StorageError": OSError,
    "Interrupted": KeyboardInterrupt,
}


def all_errors(error: type[errors.LorasmithError]) -> Iterator[type[errors.LorasmithError]]:
    for below in error.__subclasses__():
        yield below
        yield from all_errors(below)


class Told(NamedTuple):
    exit_code: int
    out: str
    err: str


def lorasmith(*arguments: str) -> Told:
    command = [sys.executable, "-m", "lorasmith", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return Told(done.returncode, done.stdout, done.stderr)


def assert_told(told: Told, exit_code: int, what: str, *labels: str) -> None:
    assert told.exit_code == exit_code, told.err
    assert told.err.startswith("error: ")
    assert what in told.err
    assert set(labels) <= set(re.findall(r"^  (where|why|do):", told.err, re.MULTILINE))
    assert "Traceback" not in told.out + told.err


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tokenizers_factory.chatml(tmp_path / "model")
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    return directory


def test_every_class_has_its_exit_code() -> None:
    assert {error.__name__: error.exit_code for error in all_errors(errors.LorasmithError)} == EXIT_CODES


@pytest.mark.parametrize("name", EXIT_CODES)
def test_the_page_of_the_module_says_the_same(name: str) -> None:
    assert re.search(rf"\b{name}\b.*\b{EXIT_CODES[name]}\b", errors.__doc__ or "")


@pytest.mark.parametrize(("name", "kind"), BUILT_IN.items())
def test_python_programs_may_catch_the_built_in_kind(name: str, kind: type[Exception]) -> None:
    assert issubclass(getattr(errors, name), kind)


@pytest.mark.parametrize("error", list(all_errors(errors.LorasmithError)), ids=lambda error: error.__name__)
def test_an_error_says_its_parts_and_survives_pickling(error: type[errors.LorasmithError]) -> None:
    one = error("what happened", where="rows.jsonl:3", why="because", fix="do this")
    assert str(one) == "what happened\n  where: rows.jsonl:3\n  why:   because\n  do:    do this"
    assert str(error("what happened")) == "what happened"
    again = pickle.loads(pickle.dumps(one))
    assert (type(again), str(again)) == (error, str(one))


def test_what_would_move_a_terminal_is_shown_not_done() -> None:
    """A tensor's name may hold anything (reliability table, row 52)."""
    told = str(errors.SetupError("a\x1b[2J\rb", where="c\u202ed", why="e\nf\tg", fix="\ud800\x9b皇上"))
    assert told == "a\\x1b[2J\\rb\n  where: c\\u202ed\n  why:   e\nf\tg\n  do:    \\ud800\\x9b皇上"
    assert Check("a", "fail", "\x1b]0;title\x07").found == "\\x1b]0;title\\x07"


def test_a_config_error(model: Path) -> None:
    told = lorasmith("train", "--model", str(model), "--set", "train.learning_rat=1")
    assert_told(told, 2, "unknown key train.learning_rat; did you mean 'learning_rate'?", "where", "do")


def test_a_family_error(model: Path, tmp_path: Path) -> None:
    told = lorasmith(
        "data", "check", str(tmp_path / "rows.jsonl"), "--model", str(model), "--family", "lama3"
    )
    assert_told(told, 2, "there is no family 'lama3'", "do")
    assert "did you mean 'llama3'?" in told.err


def test_a_data_error(model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    flags = ["--model", str(model), "--data", str(rows), "--output-dir", str(tmp_path / "run")]
    told = lorasmith("train", *flags)
    assert_told(told, 3, "1 of 2 rows cannot be trained on", "where", "why", "do")
    assert "rows.jsonl:2" in told.err
    assert not (tmp_path / "run").exists()


def test_a_setup_error(tmp_path: Path) -> None:
    told = lorasmith("chat", str(tmp_path / "nowhere"), "--prompt", "hi")
    assert_told(told, 4, f"there is no directory {tmp_path / 'nowhere'}", "do")


@pytest.mark.parametrize("place", [0, 1, -1])
def test_debug_shows_the_traceback_wherever_it_stands(place: int) -> None:
    arguments = ["train", "nowhere.yaml"]
    arguments.insert(place % 3, "--debug")
    told = lorasmith(*arguments)
    assert told.exit_code == 2
    assert "Traceback" in told.err
    assert "ConfigError: there is no config file nowhere.yaml" in told.err


def test_an_unknown_verb_is_a_wrong_command_line() -> None:
    told = lorasmith("frobnicate")
    assert told.exit_code == 2
    assert "frobnicate" in told.err
