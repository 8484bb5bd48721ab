"""Encoded rows kept in the user's cache directory, under a name made of everything that they depend on.

Scars of others that this answers: a key without the tokenizer (open-instruct #1518, LMFlow #394), or with its
runtime settings (datasets #7982, #3847); entries of an older encoder that were read on (open-instruct #1509);
files that stayed after a crash (datasets #241); caches that only grow (datasets #1973, #6614).
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from lorasmith.config import DataConfig
from lorasmith.data.entry_file import BadEntry, Entry, is_in_use, read_entry, write_entry
from lorasmith.errors import LorasmithError
from lorasmith.text.template import ChatFormat
from lorasmith.types import Conversation, Message, Role

_SUFFIX, _UNFINISHED = ".rows", ".unfinished"
_A_DAY = 24 * 3600
_LIBRARIES = ("tokenizers", "sentencepiece", "jinja2", "numpy")
_PROBES: tuple[tuple[tuple[Role, str], ...], ...] = (
    (("user", "a"), ("assistant", "b")),
    (("system", "你好 s"), ("user", " Who?\n\n"), ("assistant", "我是。"), ("user", "u"), ("assistant", "v")),
)


@dataclass(frozen=True)
class Cache:
    """Entries of one directory. It raises nothing: what cannot be read or written is done again."""

    directory: Path
    min_rows: int = 1000
    """Fewer rows are encoded sooner than a file is worth keeping."""
    max_bytes: int = 10 << 30
    """Beyond this the entries that were used longest ago go, except those that a process has open."""

    def find(self, key: str) -> Entry | None:
        path = self._path(key)
        try:
            entry = read_entry(path, key)
        except OSError:  # none there, or none to be had: storing one will tell why
            return None
        except (BadEntry, ValueError, KeyError) as error:
            warnings.warn(f"a file of the data cache is not used: {error} ({path})", stacklevel=2)
            return None
        with suppress(OSError):  # it was used now; a directory that is not ours to write stays as it is
            os.utime(path)
        return entry

    def store(
        self, key: str, facts: Mapping[str, Any], columns: Mapping[str, Sequence[NDArray[Any]]]
    ) -> Entry | None:
        """The same columns as pages of the new file, which appears whole or not at all; None without it."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._write(key, facts, columns)
            self._remove_oldest()
            return read_entry(self._path(key), key)
        except (OSError, BadEntry) as error:
            why = error.strerror if isinstance(error, OSError) else error
            warnings.warn(
                f"the encoded rows are not cached: {why} ({self.directory}); data.cache: false asks for that",
                stacklevel=2,
            )
            return None

    def _path(self, key: str) -> Path:
        return self.directory / f"{key[:40]}{_SUFFIX}"

    def _write(
        self, key: str, facts: Mapping[str, Any], columns: Mapping[str, Sequence[NDArray[Any]]]
    ) -> None:
        descriptor, name = tempfile.mkstemp(suffix=_UNFINISHED, dir=self.directory)  # readable by us alone
        try:
            with os.fdopen(descriptor, "wb") as file:
                write_entry(file, key, facts, columns)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, self._path(key))
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise

    def _remove_oldest(self) -> None:
        now = time.time()
        for path in self.directory.glob(f"*{_UNFINISHED}"):
            with suppress(OSError):
                if now - path.stat().st_mtime > _A_DAY:  # left by a process that was killed
                    path.unlink()
        files = [(path.stat(), path) for path in self.directory.glob(f"*{_SUFFIX}")]
        newest_first = sorted(files, key=lambda file: file[0].st_mtime, reverse=True)
        total = 0
        for position, (status, path) in enumerate(newest_first):
            total += status.st_size
            if position and total > self.max_bytes:
                with suppress(OSError):
                    if not is_in_use(path):
                        path.unlink()


def user_cache() -> Cache:
    """In $LORASMITH_CACHE, or $XDG_CACHE_HOME/lorasmith, or ~/.cache/lorasmith."""
    moved = os.environ.get("LORASMITH_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Cache(Path(moved or Path(base) / "lorasmith") / "data")


def entry_key(path: Path, config: DataConfig, chat_format: ChatFormat) -> str | None:
    """sha256 of all that decides what the rows of a file become; None where that cannot be told.

    The length limit, the held-out share and what happens to bad rows come after it, so they are not in it.
    """
    tokenizer = chat_format.tokenizer.fingerprint()
    code = _code_digest([*type(chat_format).__mro__, *type(chat_format.tokenizer).__mro__])
    if tokenizer is None or code is None:
        return None
    try:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError):
        return None  # reading the rows will say what is wrong
    read_by = config.model_dump(include={"format", "columns", "system", "input_separator"})
    written_by = [chat_format.name, list(chat_format.stop_ids), _probed(chat_format)]
    libraries = {name: _version(name) for name in _LIBRARIES}
    return _digest([content, path.name, read_by, written_by, tokenizer, code, libraries, sys.byteorder])


def _probed(chat_format: ChatFormat) -> list[Any]:
    """What the format makes of a few messages: a template may print the date, or have settings of its own."""
    return [_encoded(chat_format, turns) for turns in _PROBES]


def _encoded(chat_format: ChatFormat, turns: tuple[tuple[Role, str], ...]) -> list[list[int]] | str:
    try:
        example = chat_format.encode(Conversation(tuple(Message(*turn) for turn in turns), "probe"))
    except LorasmithError as error:
        return str(error)
    return [example.input_ids.tolist(), example.labels.tolist()]


def _code_digest(classes: Iterable[type]) -> str | None:
    """Of all source in the packages of these classes, ours and a plug-in's: no version number to forget."""
    digest = hashlib.sha256()
    for top in sorted({cls.__module__.partition(".")[0] for cls in classes} - {"builtins", "abc"}):
        origin = getattr(sys.modules.get(top), "__file__", None)
        if origin is None:
            return None
        home = Path(origin)
        sources = sorted(home.parent.rglob("*.py")) if home.name == "__init__.py" else [home]
        for source in sources:
            digest.update(hashlib.sha256(source.read_bytes()).digest())
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _digest(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
