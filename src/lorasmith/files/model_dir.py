"""Small files of a model directory, read with errors that say what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from lorasmith.errors import SetupError

LARGEST_JSON = 64 * 2**20
"""Bytes. The largest JSON of a model directory is the index of its shards, of a few MB."""


def read_json(path: Path, *, most_bytes: int = LARGEST_JSON, strict: bool = False) -> dict[str, Any]:
    """A JSON object. `strict`: no key twice, neither NaN nor Infinity.

    Raises: SetupError naming the file when it is absent, damaged, too large, too deep or no object.
    """
    try:
        tree = (_STRICT if strict else _LAX).decode(_read_regular(path, most_bytes).decode("utf-8"))
    except FileNotFoundError:
        fix = "check the path: a model directory holds config.json, the weights and the tokenizer"
        raise SetupError(f"there is no {path.name}", where=str(path.parent), fix=fix) from None
    except RecursionError:
        raise _unreadable(path, "its values are nested too deep") from None
    except (OSError, ValueError) as error:
        raise _unreadable(path, str(error)) from None
    if not isinstance(tree, dict):
        raise SetupError(
            f"{path.name} is no JSON object", where=str(path), why=f"it is a {type(tree).__name__}"
        )
    return tree


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


def _read_regular(path: Path, most_bytes: int) -> bytes:
    size = require_regular(path)
    if size > most_bytes:
        raise ValueError(f"it has {size:,} bytes, and no such file needs more than {most_bytes:,}")
    return path.read_bytes()


def _unreadable(path: Path, why: str) -> SetupError:
    return SetupError(f"{path.name} cannot be read", where=str(path), why=why)


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice")
    return tree


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


_LAX = json.JSONDecoder()
_STRICT = json.JSONDecoder(object_pairs_hook=_each_key_once, parse_constant=_no_number)
