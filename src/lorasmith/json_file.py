"""A JSON object out of a file that may come from anywhere: read within limits, or a plain reason why not.

Who calls knows what the file is for, and makes the reason an error of ours.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

if TYPE_CHECKING:
    from pydantic import TypeAdapter

LARGEST_JSON = 64 * 2**20
"""Bytes. The largest JSON of a model directory, tokenizer.json, has some tens of MB."""
DEEPEST = 100
"""Objects and lists within each other: far below what Python's own encoder and ours can follow."""

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_Kind = TypeVar("_Kind")


def read_object(
    path: Path, *, most_bytes: int = LARGEST_JSON, strict: bool = False, deepest: int | None = DEEPEST
) -> dict[str, Any]:
    """A JSON object. `strict`: no key twice, neither NaN nor Infinity. `deepest` None: what Python can parse.
    A byte order mark, which editors on Windows write before it, is passed over.

    Raises: OSError; ValueError for what is no regular file, too large, too deep, no UTF-8 or no object.
    """
    data = read_regular(path, most_bytes).removeprefix(codecs.BOM_UTF8)
    return parse_object(data, strict=strict, deepest=deepest)


def parse_object(data: bytes, *, strict: bool = False, deepest: int | None = DEEPEST) -> dict[str, Any]:
    """The same out of bytes. Raises: ValueError."""
    try:
        tree = (_STRICT if strict else _LAX).decode(data.decode("utf-8"))
    except RecursionError:
        raise ValueError("its values are nested too deep") from None
    if not isinstance(tree, dict):
        raise ValueError(f"it is a {type(tree).__name__}, not a JSON object")
    if deepest is not None:
        _refuse_deep(tree, deepest)
    if _SURROGATE.search(data):
        _refuse_surrogates(tree)
    return tree


def read_regular(path: Path, most_bytes: int) -> bytes:
    """A file of the ordinary kind; a pipe or a device would never end. Raises: OSError; ValueError."""
    size = path.stat().st_size
    if not path.is_file():
        raise ValueError("it is not a regular file")
    if size > most_bytes:
        raise ValueError(f"it has {size:,} bytes, and no such file needs more than {most_bytes:,}")
    with path.open("rb") as file:
        return file.read(most_bytes)


def as_record(kind: type[_Kind], tree: Mapping[str, Any]) -> _Kind:
    """`tree` as the dataclass `kind`: no key that it does not have, and each value of its type.

    Raises: ValueError naming the first key that is not so.
    """
    from pydantic import ValidationError

    unknown = tree.keys() - {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if unknown:
        raise ValueError(f"{min(unknown)[:60]!r} is a key that it cannot have")
    try:
        # As JSON: there a list is a tuple too, but no text a number.
        record: _Kind = _adapter(kind).validate_json(json.dumps(tree), strict=True)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part)[:60] for part in first["loc"])
        raise ValueError(f"{place}: {first['msg'][:200]}") from None
    return record


@cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _refuse_deep(tree: dict[str, Any], deepest: int) -> None:
    level: list[Any] = [tree]
    for _ in range(deepest):
        inner = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]
        level = [child for child in inner if isinstance(child, dict | list)]
        if not level:
            return
    raise ValueError(f"its values are nested too deep: more than {deepest} within each other")


def _refuse_surrogates(tree: dict[str, Any]) -> None:
    """Half a character can be neither printed nor written again."""
    try:
        json.dumps(tree, ensure_ascii=False).encode("utf-8")
    except (UnicodeEncodeError, RecursionError):
        raise ValueError("it holds half a character (a lone surrogate)") from None


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:60]!r} stands twice")
    return tree


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


_LAX = json.JSONDecoder()
_STRICT = json.JSONDecoder(object_pairs_hook=_each_key_once, parse_constant=_no_number)
