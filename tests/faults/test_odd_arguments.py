"""Few rows or none, names that no file has, logs we did not write: a defined result, or an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from arena import Arena
from modules import examples, save_tiny

import lorasmith as ls
from lorasmith.api import load_chat_format
from lorasmith.batching.columns import Examples
from lorasmith.cli import main as command_line
from lorasmith.config import load_run_config
from lorasmith.data.dataset import Dataset
from lorasmith.errors import ConfigError, DataError, StorageError
from lorasmith.recipe import plan
from lorasmith.runs.listing import summarize
from lorasmith.runs.metrics import read_metrics, unreadable_lines
from lorasmith.runs.progress import SilentReporter
from lorasmith.runs.run_dir import resume_told
from lorasmith.storage import storage_error

ASSETS = Path(ls.__file__).parent / "assets"
PERSONA = (ASSETS / "persona.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama3", tmp_path_factory.mktemp("few") / "base")


@pytest.mark.parametrize(
    ("count", "asked", "steps"),
    [(1, {"num_epochs": 3}, 3), (3, {"batch_size": 64, "num_epochs": 2}, 2), (5, {"max_steps": 1}, 1)],
    ids=["one row", "fewer rows than a batch", "one step"],
)
def test_few_rows_are_trained_on(base: Path, tmp_path: Path, count: int, asked: Any, steps: int) -> None:
    """`held_out` may be empty; then there is no held-out loss."""
    rows = examples(count)
    data = Dataset(tuple(rows), (), (), (), report=None, config=ls.DataConfig())
    module, config = ls.load_module(str(base), dtype="fp32"), ls.TrainConfig(**asked)
    run = ls.train(module, data, output_dir=tmp_path / "run", train=config, reporter=SilentReporter())
    assert (run.step, run.eval_loss_before, run.best_step) == (steps, None, None)
    assert len([line for line in read_metrics(tmp_path / "run") if "loss" in line]) >= 1


@pytest.mark.parametrize("nothing", [[], (), Examples.of([])], ids=["list", "tuple", "columns"])
def test_no_rows_are_refused_and_leave_nothing(base: Path, tmp_path: Path, nothing: Any) -> None:
    module = ls.load_module(str(base), dtype="fp32")
    with pytest.raises(DataError, match="no rows to train on") as caught:
        ls.train(module, nothing, output_dir=tmp_path / "run")
    assert caught.value.exit_code == 3
    assert caught.value.fix
    assert not (tmp_path / "run").exists()


REFUSED = {
    "no bytes": ("", {}, 3),
    "blank lines": ("\n\n \n", {}, 3),
    "one row, half of it held out": (PERSONA[0], {"data.eval": 0.5}, 3),
    "held-out file without rows": (PERSONA[0], {"data.eval": "EMPTY"}, 3),
    "all held out": (PERSONA[0], {"data.eval": 1.0}, 2),
    "no steps": (PERSONA[0], {"train.max_steps": 0}, 2),
    "fewer than no steps": (PERSONA[0], {"train.max_steps": -1}, 2),
    "no epochs": (PERSONA[0], {"train.num_epochs": 0}, 2),
    "a part of an epoch": (PERSONA[0], {"train.num_epochs": 0.1}, 2),
    "not-a-number of epochs": (PERSONA[0], {"train.num_epochs": float("nan")}, 2),
    "no rows in a batch": (PERSONA[0], {"train.batch_size": 0}, 2),
}


@pytest.mark.parametrize("case", REFUSED)
def test_nothing_to_do_is_refused_by_key_or_file(tmp_path: Path, case: str) -> None:
    text, changes, code = REFUSED[case]
    rows, empty = tmp_path / "rows.jsonl", tmp_path / "empty.jsonl"
    rows.write_text(text, encoding="utf-8")
    empty.touch()
    changes = {key: str(empty) if value == "EMPTY" else value for key, value in changes.items()}
    where = {"model.path": str(ASSETS / "tiny"), "data.train": str(rows)}
    with pytest.raises((DataError, ConfigError)) as caught:
        plan(load_run_config(None, {**where, "train.output_dir": str(tmp_path / "run"), **changes}))
    assert caught.value.exit_code == code
    assert any(name in str(caught.value) for name in (*changes, rows.name, empty.name, "a share of"))
    assert code == 2 or caught.value.fix
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name", ["x" * 9999, "a/" * 5000, "x" * 300 + ".jsonl", "a\0b.jsonl", "/proc/self/root" * 300, "\udc80"]
)
def test_no_name_of_a_data_file_ends_in_an_error_of_the_system(name: str) -> None:
    chat_format = load_chat_format(str(ASSETS / "tiny"))
    with pytest.raises(DataError) as caught:
        ls.load_dataset(name, chat_format)
    assert caught.value.fix
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("rows", [["a"], [{"instruction": "q"}], {}, None, 3], ids=repr)
def test_rows_in_place_of_a_file_are_told_so(rows: Any) -> None:
    with pytest.raises(ConfigError, match=f"reads a file, not a {type(rows).__name__}") as caught:
        ls.load_dataset(rows, load_chat_format(str(ASSETS / "tiny")))
    assert ".jsonl" in caught.value.fix


@pytest.mark.parametrize("verb", ["chat", "runs", "verify", "merge"])
def test_a_name_too_long_is_told_in_four_lines(verb: str, monkeypatch: Any, capsys: Any) -> None:
    flags = ["--output-dir", "merged"] if verb == "merge" else []
    monkeypatch.setattr("sys.argv", ["lorasmith", verb, "x" * 9999, *flags])
    with pytest.raises(SystemExit) as caught:
        command_line.main()
    told = capsys.readouterr().err
    assert caught.value.code == 7
    assert told.startswith("error: the system refuses: File name too long")
    assert len(told) < 600


WRONG_LINES = [
    '{"step": true, "loss": 1.0}',
    '{"step": "7", "loss": 1.0}',
    '{"step": 7, "loss": "1.0"}',
    '{"step": 7, "loss": [1.0]}',
    '{"step": 7, "eval_loss": {}}',
    '{"step": 7, "total_steps": "many"}',
    '{"step": 7, "loss": 1' + "0" * 400 + "}",
    "[" * 100_000,
    "not JSON",
    "7",
]


@pytest.mark.parametrize("line", WRONG_LINES, ids=range(len(WRONG_LINES)))
def test_a_line_of_the_log_that_we_did_not_write_is_passed_over_and_named(
    tmp_path: Path, line: str, monkeypatch: Any, capsys: Any
) -> None:
    good = json.dumps({"step": 2, "total_steps": 4, "loss": 0.5, "eval_loss": None})
    (tmp_path / "config.yaml").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text(f'{good}\n{line}\n{{"step": 3, "lo')  # the last is being written
    found = summarize(tmp_path)
    assert (found.step, found.total_steps, found.loss) == (2, 4, 0.5)
    assert found.told == "metrics.jsonl:2 cannot be read"
    assert unreadable_lines(tmp_path) == [2]
    monkeypatch.setattr("sys.argv", ["lorasmith", "runs", str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        command_line.main()
    assert not caught.value.code
    assert "metrics.jsonl:2 cannot be read" in capsys.readouterr().out


def test_a_log_that_is_no_file_is_no_log(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    assert read_metrics(tmp_path) == []


def test_resume_is_advised_where_there_is_a_run(arena: Arena, tmp_path: Path) -> None:
    """A disk that refuses a merge, or a run before its first file: the same command, and no --resume."""
    with pytest.raises(StorageError) as caught, resume_told(tmp_path):
        raise storage_error(tmp_path / "config.yaml", OSError(28, "No space left on device"))
    assert caught.value.fix.endswith("then run the same command again")
    (tmp_path / "config.yaml").touch()
    with pytest.raises(StorageError) as caught, resume_told(tmp_path):
        raise storage_error(tmp_path / "metrics.jsonl", OSError(28, "No space left on device"))
    assert caught.value.fix.endswith("again, with --resume: the checkpoints stand")
    where = {"run_dir": arena.whole, "target": arena.root / "refused"}
    told = arena.server.run("limited", limit="RLIMIT_FSIZE", value=8192, **where)["value"][1]
    assert "ulimit -f" in told
    assert "resume" not in told
