"""A data file as bounded lines and chunks of text: what is not a plain UTF-8 file is refused, and named."""

from __future__ import annotations

import codecs
import gzip
import io
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lorasmith.errors import DataError

_CHUNK_BYTES = 1 << 20
_LONGEST_SHOWN = 200
"""Characters of a name that cannot be read."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one file may ask of our memory."""

    max_row_bytes: int = 16 << 20
    max_depth: int = 64
    max_expansion: int = 200
    """A .gz file that grows by more than this is taken for a bomb, once `free_expansion_bytes` are out."""
    free_expansion_bytes: int = 64 << 20


DEFAULT_LIMITS = Limits()


@contextmanager
def open_source(path: Path, limits: Limits) -> Iterator[io.BufferedReader[Any]]:
    """The bytes of a data file, decompressed if its name ends in .gz.

    Raises: DataError if it is missing, not a regular file, empty, unreadable, UTF-16, or a gzip bomb.
    """
    _refuse_other_than_file(path)
    try:
        file = io.BufferedReader(io.FileIO(path), _CHUNK_BYTES)
    except OSError as error:
        raise DataError(f"cannot read {path}", why=str(error.strerror), fix="check its permissions") from None
    with file:
        stream: io.BufferedReader[Any] = file
        if path.suffix.lower() == ".gz":
            stream = io.BufferedReader(_Inflated(file, path, limits), _CHUNK_BYTES)
        _refuse_other_than_utf8(stream.peek(4096)[:4096], path)
        yield stream


def bounded_lines(stream: io.BufferedReader[Any], max_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """(line number, bytes) of every line, split at line feeds alone; None for a line above `max_bytes`."""
    number = 0
    while line := stream.readline(max_bytes + 1):
        number += 1
        if len(line) > max_bytes:
            while line and not line.endswith(b"\n"):
                line = stream.readline(_CHUNK_BYTES)
            yield number, None
        else:
            yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def text_chunks(stream: io.BufferedReader[Any], path: Path) -> Iterator[str]:
    """The file's text, piece by piece. Raises: DataError naming line and byte of what is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line, offset = 1, 0
    while True:
        data = stream.read(_CHUNK_BYTES)
        kept = len(decoder.getstate()[0])
        try:
            yield decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            line += error.object.count(b"\n", 0, error.start)
            raise not_utf8(error, f"{path.name}:{line}", offset - kept + error.start) from None
        line += data.count(b"\n")
        offset += len(data)
        if not data:
            return


def not_utf8(error: UnicodeDecodeError, where: str, byte: int) -> DataError:
    guess = guess_encoding(error)
    return DataError(
        "the file is not UTF-8",
        where=f"{where}, byte {byte}",
        why=f"{error.object[error.start : error.start + 8]!r} cannot be decoded; it looks like {guess}",
        fix=f"iconv -f {guess.split()[0]} -t UTF-8 OLD > NEW",
    )


def guess_encoding(error: UnicodeDecodeError) -> str:
    """A name for what the bytes may be: of the usual encodings, GB18030 alone gives Han characters."""
    sample = error.object[error.start : error.start + 400]
    try:
        text = codecs.getincrementaldecoder("gb18030")().decode(sample)
    except UnicodeDecodeError:
        return "Latin-1 (or damaged bytes)"
    han = sum("\u4e00" <= letter <= "\u9fff" or "\u3000" <= letter <= "\u303f" for letter in text)
    foreign = sum(not letter.isascii() for letter in text)
    return "GB18030" if han * 2 > foreign else "Latin-1 (or damaged bytes)"


def _refuse_other_than_file(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise DataError(f"there is no data file {path}", fix="check the path") from None
    except OSError as error:
        raise DataError(
            f"cannot read {path_shown(path)}", why=str(error.strerror), fix="check the path"
        ) from None
    except ValueError as error:
        raise DataError(f"cannot read {path_shown(path)}", why=str(error), fix="check the path") from None
    if not stat.S_ISREG(mode):
        raise DataError(
            f"{path} is not a regular file",
            why="a directory, a pipe or a device has no lines that an error could name",
            fix="name one .json, .jsonl, .csv or .parquet file (also .gz)",
        )


def path_shown(path: Path) -> str:
    """Rows given in place of a file's name can be long."""
    text = str(path)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def _refuse_other_than_utf8(head: bytes, path: Path) -> None:
    if not head:
        raise DataError(f"{path} is empty", fix="fill it with rows, one JSON object per line")
    if head.startswith(b"\x1f\x8b"):
        raise DataError(f"{path} is gzip data", fix="let its name end in .gz")
    wide = _wide_encoding(head)
    if wide:
        raise DataError(
            f"{path.name} is {wide}, not UTF-8",
            where=f"{path.name}:1, byte 0",
            fix=f"iconv -f {wide} -t UTF-8 OLD > NEW",
        )


def _wide_encoding(head: bytes) -> str | None:
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    if head.startswith(b"PAR1"):
        return None
    even, odd = head[::2].count(0), head[1::2].count(0)
    return "UTF-16" if abs(even - odd) > max(2, 0.2 * len(head)) else None


class _Inflated(io.RawIOBase):
    """The inside of a .gz file, cut off where its growth is a bomb's. Raises: DataError."""

    def __init__(self, file: IO[bytes], path: Path, limits: Limits) -> None:
        self._file, self._path, self._limits = file, path, limits
        self._gzip = gzip.GzipFile(fileobj=file)
        self._total = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._gzip.read(len(buffer))
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(
                f"{self._path} is damaged gzip data", why=str(error), fix="get the file again"
            ) from None
        self._total += len(data)
        self._refuse_bomb()
        buffer[: len(data)] = data
        return len(data)

    def _refuse_bomb(self) -> None:
        packed = self._file.tell()
        if self._total > max(self._limits.free_expansion_bytes, self._limits.max_expansion * packed):
            raise DataError(
                f"{self._path} grows without bound",
                why=f"{packed:,} bytes hold {self._total:,} and more: over {self._limits.max_expansion} to 1",
                fix="if the file is yours, unpack it and name the unpacked file",
            )
