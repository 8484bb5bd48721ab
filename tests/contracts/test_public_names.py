"""What `lorasmith` offers by name, and what asking it costs: no torch until a model is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import tokenizers_factory

import lorasmith as ls

HEAVY = ("torch", "transformers", "peft")
WATCH = """
import atexit, json, os, sys
heavy = lambda: [name for name in {heavy!r} if name in sys.modules]
atexit.register(lambda: open({report!r}, "w").write(json.dumps(heavy())))
sys.argv = ["lorasmith", *{arguments!r}]
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def loaded_by(arguments: list[str], tmp_path: Path) -> tuple[int, list[str]]:
    """The exit code of a command line, and which heavy libraries it loaded."""
    report = tmp_path / "loaded.json"
    code = WATCH.format(heavy=HEAVY, report=str(report), arguments=arguments)
    done = run(code + "from lorasmith.cli.main import main; main()")
    return done.returncode, json.loads(report.read_text())


def test_the_list_of_names_is_sorted_and_has_no_name_twice() -> None:
    assert ls.__all__ == sorted(set(ls.__all__))


@pytest.mark.parametrize("name", ls.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(ls, name).__name__ == name


def test_nothing_else_is_offered() -> None:
    assert set(dir(ls)) == {*ls.__all__, "__version__"}
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        _ = ls.Trainer
    names: dict[str, object] = {}
    exec("from lorasmith import *", names)
    assert set(names) - {"__builtins__"} == set(ls.__all__)


def test_importing_loads_nothing_heavy() -> None:
    done = run(f"import sys, lorasmith; print([name for name in {HEAVY} if name in sys.modules])")
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["chat", "--help"], 0),
        (["families"], 0),
        (["runs"], 0),
        (["train", "-o", "nowhere", "--resume"], 4),
        (["train", "--set", "train.learning_rat=1"], 2),
        (["train", "no-such-recipe.yaml"], 2),
        (["chat", "somewhere", "--prompt", "hi", "--temperature", "0"], 2),
    ],
)
def test_what_needs_no_model_loads_nothing_heavy(
    arguments: list[str], exit_code: int, tmp_path: Path
) -> None:
    assert loaded_by(arguments, tmp_path) == (exit_code, [])


@pytest.mark.parametrize("verb", ["check", "stats", "preview"])
def test_looking_at_data_loads_nothing_heavy(verb: str, tmp_path: Path) -> None:
    model = tokenizers_factory.chatml(tmp_path / "model")
    (model / "config.json").write_text('{"model_type": "qwen2"}')
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Who are you?", "completion": "I am."}\n')
    assert loaded_by(["data", verb, str(rows), "--model", str(model)], tmp_path) == (0, [])


def test_the_module_runs_as_a_command() -> None:
    try:
        version("lorasmith")
    except PackageNotFoundError:
        pytest.skip("lorasmith is not installed, only on the path")
    command = [sys.executable, "-m", "lorasmith", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"lorasmith {ls.__version__}\n")
