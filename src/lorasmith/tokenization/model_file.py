"""What kind of piece a word is, inside a tokenizer.model: a protobuf message of sentencepiece's.

By hand, because the reader that sentencepiece ships runs under the newest protobuf only, which other packages
forbid. Source: sentencepiece_model.proto; the wire format of protobuf.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_PIECES = 1 << 3 | _BYTES  # ModelProto.pieces
_TEXT = 1 << 3 | _BYTES  # SentencePiece.piece
_KIND = 3 << 3 | _VARINT  # SentencePiece.type
_IS_CONTROL = bytes([_KIND, 3])
_IS_USER_DEFINED = bytes([_KIND, 4])


class _Field(NamedTuple):
    key: int  # field number and wire type, as they stand in the file
    whole: bytes
    content: bytes


def with_control_pieces(model: bytes, pattern: str) -> bytes:
    """The model, in which every piece whose whole text matches `pattern` is a control piece.

    Raises: ValueError if `model` is no protobuf message.
    """
    matches = re.compile(pattern).fullmatch
    return b"".join(
        _as_control(field) if field.key == _PIECES and matches(_text_of(field)) else field.whole
        for field in _fields(model)
    )


def user_defined_pieces(model: bytes) -> list[int]:
    """Ids of the pieces that stand whole wherever a text has them; sentencepiece's reader does not tell.

    Raises: ValueError if `model` is no protobuf message.
    """
    pieces = (field for field in _fields(model) if field.key == _PIECES)
    return [i for i, piece in enumerate(pieces) if _kind_of(piece) == _IS_USER_DEFINED]


def _kind_of(piece: _Field) -> bytes:
    kinds = [field.whole for field in _fields(piece.content) if field.key == _KIND]
    return kinds[-1] if kinds else b""


def _as_control(piece: _Field) -> bytes:
    content = piece.content + _IS_CONTROL  # of a field that stands twice, the last one counts
    return bytes([_PIECES]) + _written(len(content)) + content


def _text_of(piece: _Field) -> str:
    return next((field.content for field in _fields(piece.content) if field.key == _TEXT), b"").decode()


def _fields(message: bytes) -> Iterator[_Field]:
    at = 0
    while at < len(message):
        key, start = _varint(message, at)
        start, end = _extent(message, key & 7, start)
        if end > len(message):
            raise ValueError("the file ends in the middle of a field")
        yield _Field(key, message[at:end], message[start:end])
        at = end


def _extent(message: bytes, wire_type: int, at: int) -> tuple[int, int]:
    """Where the content of a field begins and ends."""
    if wire_type == _BYTES:
        length, start = _varint(message, at)
        return start, start + length
    if wire_type == _VARINT:
        return at, _varint(message, at)[1]
    if wire_type not in (_FIXED32, _FIXED64):
        raise ValueError(f"there is no wire type {wire_type}")
    return at, at + (4 if wire_type == _FIXED32 else 8)


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number, seven bits a byte, lowest first; and where it ends."""
    if at < len(message) and message[at] < 0x80:  # nearly all of them: the walk takes a third of the time
        return message[at], at + 1
    number, shift = 0, 0
    for end, byte in enumerate(message[at : at + 10], at + 1):
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, end
        shift += 7
    raise ValueError("the file ends in the middle of a number")


def _written(number: int) -> bytes:
    low, rest = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + _written(rest) if rest else bytes([low])
