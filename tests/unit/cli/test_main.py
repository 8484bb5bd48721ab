"""The list of verbs: quick to show, and held to what each verb says of itself."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer.main
from typer.testing import CliRunner

from lorasmith.cli.main import VERBS, app

HEAVY = ("torch", "transformers", "peft", "numpy", "pydantic", "yaml", "rich", "lorasmith.config")


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_the_help_of_the_whole_imports_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import sys\nfrom lorasmith.cli.main import main\n"
        f"sys.argv = ['lorasmith', *{arguments!r}]\n"
        "try:\n    main()\nexcept BaseException as end:\n    pass\n"
        f"print('loaded:', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded: []"


@pytest.mark.parametrize("name", VERBS)
def test_the_table_says_what_the_verb_says(name: str) -> None:
    verb = typer.main.get_command(app).get_command(None, name)  # type: ignore[attr-defined]
    assert verb.name == name
    assert verb.help.startswith(VERBS[name].help)
    assert VERBS[name].help.endswith(".")


def test_help_lists_every_verb_in_order() -> None:
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    table = shown.partition("Commands:\n")[2].partition("\n\n")[0].splitlines()
    assert [line.split()[0] for line in table if not line.startswith("   ")] == list(VERBS)


def test_a_misspelt_verb_is_told_the_nearest() -> None:
    result = CliRunner().invoke(app, ["trian"])
    assert result.exit_code == 2
    assert "Did you mean 'train'?" in result.output


@pytest.mark.parametrize("path", [["train"], ["data"], ["data", "check"], ["chat"]])
def test_a_verb_shows_its_own_help(path: list[str]) -> None:
    result = CliRunner().invoke(app, [*path, "--help"])
    assert result.exit_code == 0
    assert f" {' '.join(path)} [OPTIONS]" in result.output.splitlines()[0]
