"""Every `lorasmith ...` line of the pages is a command that the command line takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from lorasmith.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
COMMAND = re.compile(r"^\s*(?:\$ )?lorasmith ([^\n]*)$", re.MULTILINE)
BLOCK = re.compile(r"```(?:bash|sh|console)?\n(.*?)```", re.DOTALL)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = [
    (page.name, line)
    for page in PAGES
    for block in BLOCK.findall(page.read_text(encoding="utf-8"))
    for line in COMMAND.findall(block)
]


def parse(line: str) -> None:
    """As the command line does, up to where the verb would be called."""
    verb, *arguments = shlex.split(line, comments=True)
    if verb.startswith("-"):
        return
    command = typer.main.get_command(app).get_command(None, verb)  # type: ignore[attr-defined]
    assert command is not None, f"there is no verb {verb}"
    if hasattr(command, "commands"):
        command, arguments = command.commands[arguments[0]], arguments[1:]
    command.make_context(verb, arguments)


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 30


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=lambda part: part[:60])
def test_the_command_line_takes_it(page: str, line: str) -> None:
    parse(line)


def test_it_takes_no_other() -> None:
    with pytest.raises(Exception, match="--no-such-flag"):
        parse("train recipe.yaml --no-such-flag")
