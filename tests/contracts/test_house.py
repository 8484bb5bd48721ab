"""The house rules that a program can check."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
DUMPING_GROUNDS = {"utils", "util", "common", "helpers", "helper", "misc", "manager", "managers"}

MAY_IMPORT_INSIDE = {
    "api.py": "rooms with torch in them are imported by the calls that need them",
    "recipe.py": "the same, for a whole recipe",
    "cli/": "a config error must be told before torch is loaded",
    "hub/download.py": "each hub's client is loaded when that hub is asked",
    "testing/family.py": "the laws of text need no torch; those of models do",
}
"""Files (or rooms) in which functions import from our own rooms, and why."""

ONE_FILE_PER_THING = {
    "cli": "a file for each verb",
    "doctor": "a file for each thing that can be unfit",
    "families": "a file for each family",
}
"""Rooms that grow by one file with each thing of their kind, and the kind."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def inside(path: Path) -> str:
    return path.relative_to(ROOT / "src/lorasmith").as_posix()


def functions(path: Path) -> Iterator[Function]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    yield from (node for node in ast.walk(tree) if isinstance(node, Function))


def code_lines(function: Function) -> int:
    """Lines from `def` to the end, without the docstring."""
    first = function.body[0]
    is_docstring = ast.get_docstring(function, clean=False) is not None
    told = (first.end_lineno or 0) - first.lineno + 1 if is_docstring else 0
    return (function.end_lineno or 0) - function.lineno + 1 - told


def first_party_imports(function: Function) -> Iterator[str]:
    for node in ast.walk(function):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("lorasmith")):
            yield node.module or "."
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.startswith("lorasmith"))


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {inside(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_no_function_is_longer_than_50_lines() -> None:
    lengths = {f"{inside(p)}:{f.name}": code_lines(f) for p in SOURCES for f in functions(p)}
    assert {name: length for name, length in lengths.items() if length > 50} == {}


def test_no_room_or_file_is_a_dumping_ground() -> None:
    names = {part.removesuffix(".py") for path in SOURCES for part in path.relative_to(ROOT / "src").parts}
    assert names & DUMPING_GROUNDS == set()


def test_rooms_are_one_level_deep() -> None:
    assert [inside(path) for path in SOURCES if len(Path(inside(path)).parts) > 2] == []


def test_a_room_of_more_than_eight_files_is_two_rooms() -> None:
    rooms = Counter(path.parent.name for path in SOURCES if path.name != "__init__.py")
    del rooms["lorasmith"]  # the house itself: its front door and the words that every room speaks
    full = {room for room, files in rooms.items() if files > 8}
    assert full - ONE_FILE_PER_THING.keys() == set()
    assert ONE_FILE_PER_THING.keys() <= rooms.keys()


@pytest.mark.parametrize("path", SOURCES, ids=inside)
def test_every_file_says_what_it_is_for(path: Path) -> None:
    assert path.name == "__main__.py" or ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.relative_to(ROOT / "tests").as_posix())
def test_a_test_file_has_tests(path: Path) -> None:
    assert [function.name for function in functions(path) if function.name.startswith("test_")]


def test_everything_public_in_the_api_is_documented() -> None:
    tree = ast.parse((ROOT / "src/lorasmith/api.py").read_text(encoding="utf-8"))
    public = [n for n in tree.body if isinstance(n, Function | ast.ClassDef) and not n.name.startswith("_")]
    bare = [node.name for node in public if ast.get_docstring(node) is None]
    # A frozen dataclass whose fields say all; Python gives it no docstring of its own.
    assert [name for name in bare if name != "Evaluation"] == []


def test_rooms_import_each_other_at_the_top_of_the_file() -> None:
    found = {
        f"{inside(path)}:{function.name} imports {module}"
        for path in SOURCES
        for function in functions(path)
        for module in first_party_imports(function)
        if not any(inside(path).startswith(allowed) for allowed in MAY_IMPORT_INSIDE)
    }
    assert found == set()


@pytest.mark.parametrize("allowed", MAY_IMPORT_INSIDE)
def test_no_exception_outlives_its_reason(allowed: str) -> None:
    mine = [path for path in SOURCES if inside(path).startswith(allowed)]
    assert any(list(first_party_imports(f)) for path in mine for f in functions(path))


def test_imports_go_down_only() -> None:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
