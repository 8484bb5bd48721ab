"""Small files of a model directory, read with errors that say what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorasmith.errors import SetupError
from lorasmith.json_file import LARGEST_JSON, read_object


def read_json(path: Path, *, most_bytes: int = LARGEST_JSON, strict: bool = False) -> dict[str, Any]:
    """A JSON object. `strict`: no key twice, neither NaN nor Infinity.

    Raises: SetupError naming the file when it is absent, damaged, too large, too deep or no object.
    """
    try:
        return read_object(path, most_bytes=most_bytes, strict=strict)
    except FileNotFoundError:
        fix = "check the path: a model directory holds config.json, the weights and the tokenizer"
        raise SetupError(f"there is no {path.name}", where=str(path.parent), fix=fix) from None
    except (OSError, ValueError) as error:
        raise unreadable(path, str(error)) from None


def read_json_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def require_regular(path: Path) -> int:
    """The size in bytes of a file of the ordinary kind. A pipe or a device would never end.

    Raises: FileNotFoundError; SetupError for any other kind.
    """
    size = path.stat().st_size
    if not path.is_file():
        fix = "put the real file there"
        raise SetupError(f"{path.name} is not a regular file", where=str(path), fix=fix)
    return size


def unreadable(path: Path, why: str) -> SetupError:
    fix = "copy or download the file again"
    return SetupError(f"{path.name} cannot be read", where=str(path), why=why, fix=fix)
