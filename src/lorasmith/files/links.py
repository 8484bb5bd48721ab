"""Symbolic links in a directory that we write: none may lead what we write out of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lorasmith.errors import SetupError


def refuse_links(directory: Path, names: Iterable[str]) -> None:
    """`names` are what will be written in `directory`, which may itself be reached by a link of the user's.

    Raises: SetupError naming the first that is a symbolic link, wherever it leads, also to nothing.
    """
    for name in names:
        path = directory / name
        if path.is_symlink():
            raise SetupError(
                f"{name} is a symbolic link",
                where=str(path),
                why="what is written there would change a file elsewhere",
                fix="remove the link, or choose another output directory",
            )
