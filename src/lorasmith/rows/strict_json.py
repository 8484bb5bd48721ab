"""JSON as RFC 8259 has it, with a name for every departure, and with the place where the next value begins.

Python's parser takes duplicate keys, NaN and 1e400; this one refuses them, and it can go on behind a value
that it refused, so that one bad row is told as one bad row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn

_STRING = re.compile(r'"[^"\\\n]*(?:\\[^\n][^"\\\n]*)*\\?(?:(?P<close>")|\n|\Z)')
_MARK = re.compile(_STRING.pattern + r"|[\[\]{}]")
_SCALAR = re.compile(r"[^\s,\[\]{}]+")
_SPACE = re.compile(r"[ \t\r\n]*")
_OPENER_OF = {"}": "{", "]": "["}


class JsonFault(ValueError):
    """One value that is refused. `end` is the index behind it, where that is known."""

    def __init__(self, rule: str, value: str, fix: str, end: int | None = None) -> None:
        super().__init__(f"{rule}: {value}")
        self.rule, self.value, self.fix, self.end = rule, value, fix, end


class BrokenArray(ValueError):
    """The array itself is damaged: behind `line` nobody can say where a row begins."""

    def __init__(self, line: int, why: str) -> None:
        super().__init__(why)
        self.line = line


def parse_value(text: str, start: int = 0) -> tuple[Any, int]:
    """The JSON value at `start` and the index behind it. Raises: JsonFault."""
    try:
        return _STRICT.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise _syntax_fault(text, start, error) from None
    except RecursionError:
        raise JsonFault("too-deep", _near(text, start), "flatten the row") from None
    except JsonFault:
        raise
    except ValueError as error:  # an integer of more digits than Python converts
        raise JsonFault("number-range", str(error), "write the number as text") from None


def parse_line(text: str) -> Any:
    """The one JSON value of a line. Raises: JsonFault."""
    text = text.strip(" \t\r\n")
    value, end = parse_value(text)
    if end < len(text):
        fix = "one JSON value per line; a file that holds one array begins with ["
        raise JsonFault("extra-data", f"behind the value: {_near(text, end, before=0)}", fix)
    return value


def array_elements(chunks: Iterator[str], max_chars: int) -> Iterator[tuple[str, Any]]:
    """(place, value) of every element of a JSON array, in memory bounded by `max_chars`.

    The place is the line, or line:column behind another element of the same line. A refused element comes
    as its JsonFault. Raises: BrokenArray.
    """
    window = _Window(chunks)
    window.take("[")
    if window.peek() != "]":
        yield str(window.line), _next_element(window, max_chars)
        while window.peek() == ",":
            last_line = window.line
            window.take(",")
            window.peek()
            column = f":{window.column}" if window.line == last_line else ""
            yield f"{window.line}{column}", _next_element(window, max_chars)
    window.take("]")
    if window.peek():
        raise BrokenArray(window.line, f"text behind the array's end: {window.near()}")


def end_of_value(text: str, start: int, *, complete: bool) -> int | None:
    """Where a value that may be broken ends, by its brackets and quotes; None if not within `text`.

    A quote that its line does not close is taken to end there, so that it cannot swallow the next rows.
    `complete`: no more text follows, so a string that runs to the end of `text` is really cut.
    """
    if text[start] not in "[{":
        scalar = _STRING.match(text, start) or _SCALAR.match(text, start)
        return scalar.end() if scalar else None
    open_brackets: list[str] = []
    for mark in _MARK.finditer(text, start):
        sign = mark[0]
        if sign in "[{":
            open_brackets.append(sign)
        elif sign in "]}":
            _close(open_brackets, _OPENER_OF[sign])
        elif not mark["close"] and mark.end() == len(text) and not complete:
            return None
        if not open_brackets:
            return mark.end()
    return None


def _close(open_brackets: list[str], opener: str) -> None:
    if opener in open_brackets:
        while open_brackets.pop() != opener:
            pass


class _Window:
    """The part of a text that is being parsed: it grows at its end and forgets its beginning."""

    def __init__(self, chunks: Iterator[str]) -> None:
        self._chunks = chunks
        self.text, self.at, self.ended = "", 0, False
        self.line, self.column = 1, 1

    def grow(self) -> None:
        """Read on, at least as much as is pending: a long element is parsed log times, not chunk by chunk."""
        parts, missing = [self.text[self.at :]], max(1, len(self.text) - self.at)
        while missing > 0 and not self.ended:
            chunk = next(self._chunks, None)
            if chunk is None:
                self.ended = True
            else:
                parts.append(chunk)
                missing -= len(chunk)
        self.text, self.at = "".join(parts), 0

    def advance(self, end: int) -> None:
        breaks = self.text.count("\n", self.at, end)
        line_start = self.text.rfind("\n", self.at, end) + 1 if breaks else self.at - self.column + 1
        self.line, self.column = self.line + breaks, end - line_start + 1
        self.at = end

    def peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        sign = self.text[self.at : self.at + 1]
        if sign and sign not in " \t\r\n":
            return sign
        while True:
            space = _SPACE.match(self.text, self.at)
            assert space is not None
            self.advance(space.end())
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.grow()

    def take(self, sign: str) -> None:
        if self.peek() != sign:
            found = self.near() if self.peek() else "the end of the file"
            raise BrokenArray(self.line, f"expected {sign!r}, found {found}")
        self.advance(self.at + 1)

    def near(self) -> str:
        return _near(self.text, self.at, before=0)


def _next_element(window: _Window, max_chars: int) -> Any:
    if window.peek() in ("", ",", "]", "}"):
        raise BrokenArray(window.line, "a row is missing here: the file is cut, or there is a comma too many")
    while True:
        value, end = _try_element(window)
        if end is not None and (end < len(window.text) or window.ended):
            too_long = end - window.at > max_chars
            window.advance(end)
            return row_too_long(max_chars) if too_long else value
        if len(window.text) - window.at > max_chars:
            raise BrokenArray(
                window.line, f"the row that begins here is longer than {max_chars:,} characters"
            )
        if window.ended:
            raise BrokenArray(window.line, f"the row that begins here never ends: {window.near()}")
        window.grow()


def _try_element(window: _Window) -> tuple[Any, int | None]:
    try:
        return parse_value(window.text, window.at)
    except JsonFault as fault:
        if fault.end is not None:
            return fault, fault.end
        return fault, end_of_value(window.text, window.at, complete=window.ended)


def row_too_long(limit: int) -> JsonFault:
    return JsonFault("row-too-long", f"more than {limit:,}", "cut the row into shorter conversations")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise JsonFault("duplicate-key", repr(twice), "keep one of the two: readers differ on which counts")
    return fields


def _constant(name: str) -> NoReturn:
    raise JsonFault("not-json-number", name, "JSON has neither NaN nor Infinity: leave the key out")


def _float(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise JsonFault("number-range", digits, "the number is too large: write it as text")
    return number


_STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)
_LAX = json.JSONDecoder(strict=False)


def _syntax_fault(text: str, start: int, error: json.JSONDecodeError) -> JsonFault:
    near = f"{error.msg}: {_near(text, error.pos)}"
    if not error.msg.startswith("Invalid control character"):
        return JsonFault("broken-json", near, "repair the JSON near there (a quote, comma or bracket)")
    try:
        _, end = _LAX.raw_decode(text, start)
    except (ValueError, RecursionError):
        end = None
    return JsonFault("control-character", near, r"write it escaped (a line break is \n), or remove it", end)


def _near(text: str, position: int, before: int = 20) -> str:
    return repr(text[max(0, position - before) : position + 30])
