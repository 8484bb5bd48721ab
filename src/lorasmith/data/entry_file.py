"""One file of a cache: named columns of numbers, and some facts as JSON; written whole, read as mapped pages.

Layout: MAGIC, the header's length (8 bytes) and sha256 (32 bytes), the header in JSON, and the columns, each
at a multiple of 64 bytes. The header has every column's type, place and CRC-32. Nothing in it is
executed.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
import sys
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

if sys.platform != "win32":
    import fcntl

_MAGIC = b"LSROWS1\n"
_HEAD = struct.Struct("<8sQ32s")
_ALIGNED = 64
_DTYPES = ("|u1", "<i4")
_BLOCK_BYTES = 1 << 20


class BadEntry(ValueError):
    """The file is not what was written: cut, foreign, or damaged."""


@dataclass(frozen=True, eq=False)
class Entry:
    facts: dict[str, Any]
    columns: dict[str, NDArray[Any]]


def write_entry(
    file: IO[bytes], key: str, facts: Mapping[str, Any], columns: Mapping[str, Sequence[NDArray[Any]]]
) -> None:
    """Columns come as blocks to be laid end to end. Raises: OSError."""
    places: dict[str, dict[str, Any]] = {}
    offset = 0
    for name, blocks in columns.items():
        checksum, size = 0, 0
        for block in blocks:
            checksum = zlib.crc32(np.ascontiguousarray(block).data.cast("B") if block.size else b"", checksum)
            size += block.nbytes
        places[name] = {"dtype": blocks[0].dtype.str, "offset": offset, "bytes": size, "crc32": checksum}
        offset = _aligned(offset + size)
    header = json.dumps({"key": key, "facts": facts, "columns": places}).encode()
    file.write(_HEAD.pack(_MAGIC, len(header), hashlib.sha256(header).digest()) + header)
    _pad(file)
    for blocks in columns.values():
        for block in blocks:
            file.write(np.ascontiguousarray(block).data)
        _pad(file)


def read_entry(path: Path, key: str) -> Entry:
    """The columns as views of the mapped file. The file stays locked against removal while any of them lives.

    Raises: FileNotFoundError; BadEntry if it is cut, damaged, or of another key; OSError.
    """
    with path.open("rb") as file:
        _share_lock(file)
        header, start = _read_header(file)
        if header["key"] != key:
            raise BadEntry("it is of other rows")
        size = os.fstat(file.fileno()).st_size
        for place in header["columns"].values():
            _check_column(file, start, size, place)
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    columns = {name: _view(pages, start, place) for name, place in header["columns"].items()}
    return Entry(header["facts"], columns)


def is_in_use(path: Path) -> bool:
    """Whether a process has this entry mapped. Raises: OSError."""
    if sys.platform == "win32":
        return False  # it does not remove an open file
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def _share_lock(file: IO[bytes]) -> None:
    """Held by the open file itself, so for as long as the map that is made of it."""
    if sys.platform != "win32":
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(file, fcntl.LOCK_SH)


def _read_header(file: IO[bytes]) -> tuple[dict[str, Any], int]:
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size or not head.startswith(_MAGIC):
        raise BadEntry("it does not begin as one of ours")
    _, length, digest = _HEAD.unpack(head)
    if length > os.fstat(file.fileno()).st_size:
        raise BadEntry("it ends within its header")
    header = file.read(length)
    if hashlib.sha256(header).digest() != digest:
        raise BadEntry("its header is damaged")
    tree: dict[str, Any] = json.loads(header)
    return tree, _aligned(_HEAD.size + length)


def _check_column(file: IO[bytes], start: int, size: int, place: Mapping[str, Any]) -> None:
    first, left = start + place["offset"], place["bytes"]
    if place["dtype"] not in _DTYPES or first + left > size:
        raise BadEntry("it is cut off")
    file.seek(first)
    checksum = 0
    while left:
        block = file.read(min(left, _BLOCK_BYTES))
        if not block:
            raise BadEntry("it is cut off")
        checksum = zlib.crc32(block, checksum)
        left -= len(block)
    if checksum != place["crc32"]:
        raise BadEntry("its content is damaged")


def _view(pages: mmap.mmap, start: int, place: Mapping[str, Any]) -> NDArray[Any]:
    dtype = np.dtype(place["dtype"])
    return np.frombuffer(pages, dtype, place["bytes"] // dtype.itemsize, start + place["offset"])


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNED) * _ALIGNED


def _pad(file: IO[bytes]) -> None:
    file.write(bytes(_aligned(file.tell()) - file.tell()))
