"""The header of a safetensors file: names, types and shapes, without a byte of its tensors.

Source: the safetensors format: 8 bytes of length, a JSON object of that length, then the data, which the
tensors share out among themselves without gap or overlap.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasmith.files.model_dir import require_regular, unreadable
from lorasmith.json_file import parse_object

LARGEST_HEADER = 32 * 2**20
"""Bytes: room for the names of 200,000 tensors. The format itself allows 100 MB."""
_METADATA = "__metadata__"
_MOST_AXES = 32
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


@dataclass(frozen=True)
class TensorHeader:
    """One tensor of the file."""

    dtype: str
    """By the format's own name: F32, BF16, ..."""
    shape: tuple[int, ...]
    start: int
    end: int
    """Where its bytes lie in the data."""


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Every tensor by its name.

    Raises: SetupError where the file is cut, or its header is not what the format asks for.
    """
    try:
        tree, data_bytes = _read_tree(path)
        _require_metadata(tree.pop(_METADATA, None))
        header = {name: _tensor(name, told) for name, told in tree.items()}
        _require_whole(header, data_bytes)
    except (OSError, ValueError) as error:
        raise unreadable(path, str(error)) from None
    return header


def _read_tree(path: Path) -> tuple[dict[str, Any], int]:
    """The header's JSON, and how many bytes of data follow it."""
    size = require_regular(path)
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise ValueError("it has no readable header: it ends before it")
        (length,) = struct.unpack("<Q", start)
        if length > size - 8:
            raise ValueError(f"it has {size:,} bytes, and no room for a header of {length:,}")
        if length > LARGEST_HEADER:
            raise ValueError(f"its header has {length:,} bytes, and none needs more than {LARGEST_HEADER:,}")
        return parse_object(file.read(length), strict=True), size - 8 - length


def _require_metadata(told: Any) -> None:
    is_text = isinstance(told, dict) and all(isinstance(value, str) for value in told.values())
    if told is not None and not is_text:
        raise ValueError(f"its header is damaged: {_METADATA} is no table of texts")


def _tensor(name: str, told: Any) -> TensorHeader:
    """Raises: ValueError for a type that the format does not have, or sizes that are none."""
    if not isinstance(told, dict) or told.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(name, "it needs dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = told["dtype"], told["shape"], told["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _damaged(name, f"there is no dtype {str(dtype)[:20]!r}")
    if not _are_sizes(shape) or len(shape) > _MOST_AXES:
        raise _damaged(name, "its shape is no list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(name, "its data_offsets are no start and end")
    if math.prod(shape) * _BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        raise _damaged(name, f"{dtype} {tuple(shape)} does not fill {offsets[1] - offsets[0]:,} bytes")
    return TensorHeader(dtype, tuple(shape), *offsets)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _require_whole(header: dict[str, TensorHeader], data_bytes: int) -> None:
    """Raises: ValueError where tensors leave a gap, share bytes, or do not end where the file does."""
    at = 0
    for name, tensor in sorted(header.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != at:
            raise _damaged(name, f"it starts at byte {tensor.start:,}, the one before ends at {at:,}")
        at = tensor.end
    if at != data_bytes:
        raise ValueError(f"it has {data_bytes:,} bytes of data, its header says {at:,}")


def _damaged(name: str, why: str) -> ValueError:
    return ValueError(f"its header is damaged: {name[:80]!r}: {why}")
