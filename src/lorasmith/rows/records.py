"""A data file -> its rows, each with its place: nothing is coerced, nothing is skipped in silence."""

from __future__ import annotations

import csv
import io
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from lorasmith.errors import DataError, SetupError
from lorasmith.rows.source import (
    DEFAULT_LIMITS,
    Limits,
    bounded_lines,
    guess_encoding,
    not_utf8,
    open_source,
    path_shown,
    text_chunks,
)
from lorasmith.rows.strict_json import BrokenArray, JsonFault, array_elements, parse_line, row_too_long

KINDS = (".json", ".jsonl", ".csv", ".parquet")

_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_HEAD_CHARS = 72


@dataclass(frozen=True, slots=True)
class Record:
    """One row as it stands in the file, and its place ("huanhuan.json:17")."""

    fields: Mapping[str, Any]
    origin: str


@dataclass(frozen=True, slots=True)
class BadRow:
    """One row that cannot be trained on: the rule it breaks, the head of the value, and what to do."""

    origin: str
    rule: str
    value_head: str
    fix: str

    def to_json(self) -> dict[str, str]:
        return asdict(self)


Row: TypeAlias = Record | BadRow


def read_records(path: Path, *, limits: Limits = DEFAULT_LIMITS) -> Iterator[Row]:
    """The rows of a .json (array or lines), .jsonl, .csv or .parquet file, also with .gz, one by one.

    A JSON row's place is the line it begins on; a Parquet row's place is its number.

    Raises: DataError if the file as a whole cannot be read, or has no rows; SetupError without pyarrow.
    """
    path = Path(path)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else "".join(suffixes[-1:])
    if kind not in KINDS:
        known = ", ".join(KINDS)
        raise DataError(
            f"{path_shown(path)} is of no kind that we read", why=f"known: {known}, also .gz", fix="rename it"
        )
    empty = True
    with open_source(path, limits) as stream:
        for row in _rows_of(kind, stream, path, limits):
            empty = False
            yield row
    if empty:
        raise DataError(f"{path} has no rows", fix="fill it with rows, one JSON object per line")


def check_row(value: Any, origin: str, limits: Limits) -> Row:
    """A parsed row as a Record, unless it is no object or holds what no text may hold."""
    if isinstance(value, JsonFault):
        return BadRow(origin, value.rule, value.value, value.fix)
    if not isinstance(value, dict):
        return BadRow(origin, "not-an-object", head(value), "write the row as an object: {...}")
    if not value:
        return BadRow(origin, "empty-row", "{}", "fill the row or remove it")
    return _content_fault(value, origin, limits.max_depth) or Record(value, origin)


def head(value: Any, name: str = "") -> str:
    """The beginning of a value as a message quotes it: escaped, so that it cannot harm a terminal."""
    shown = "null" if value is None else repr(value[:_HEAD_CHARS] if isinstance(value, str) else value)
    cut = shown if len(shown) <= _HEAD_CHARS else shown[: _HEAD_CHARS - 3] + "..."
    return f"{name} = {cut}" if name else cut


def _rows_of(kind: str, stream: io.BufferedReader[Any], path: Path, limits: Limits) -> Iterator[Row]:
    if kind == ".csv":
        return _read_csv(stream, path, limits)
    if kind == ".parquet":
        return _read_parquet(stream, path, limits)
    start = stream.peek(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if kind == ".json" and start.split(b"\n", 1)[0].strip() == b"{":
        fix = "put the rows into one array, [{...}, {...}], or write one object per line"
        raise DataError("the file holds one object, not rows", where=f"{path.name}:1", fix=fix)
    is_array = start.startswith(b"[") if kind == ".json" else _is_misnamed_array(start)
    return _read_array(stream, path, limits) if is_array else _read_lines(stream, path, limits)


def _is_misnamed_array(start: bytes) -> bool:
    """A .jsonl that is an array of objects; a first line that is a whole list is just a bad row."""
    first, _, rest = start.partition(b"\n")
    return bool(re.match(rb"\[\s*(\{|$)", first)) and not (first.rstrip().endswith(b"]") and rest.strip())


def _read_array(stream: io.BufferedReader[Any], path: Path, limits: Limits) -> Iterator[Row]:
    try:
        for place, value in array_elements(text_chunks(stream, path), limits.max_row_bytes):
            yield check_row(value, f"{path.name}:{place}", limits)
    except BrokenArray as error:
        raise DataError(
            "the JSON array is damaged, so the rest of the file cannot be read",
            where=f"{path.name}:{error.line}",
            why=str(error),
            fix="repair it there or get the file again; in a .jsonl single bad rows can be skipped",
        ) from None


def _read_lines(stream: io.BufferedReader[Any], path: Path, limits: Limits) -> Iterator[Row]:
    for number, line in bounded_lines(stream, limits.max_row_bytes):
        if line is None or not line.isspace():
            yield check_row(_parse_bytes(line, limits), f"{path.name}:{number}", limits)


def _parse_bytes(line: bytes | None, limits: Limits) -> Any:
    if line is None:
        return row_too_long(limits.max_row_bytes)
    try:
        return parse_line(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        shown = f"{line[error.start : error.start + 8]!r} at byte {error.start} of the line"
        return JsonFault(
            "not-utf8", shown, f"convert the file to UTF-8; it looks like {guess_encoding(error)}"
        )
    except JsonFault as fault:
        if fault.rule == "broken-json" and not line.endswith(b"\n"):
            return JsonFault(
                "cut-off", fault.value, "the last line is cut: get the file again, or remove the line"
            )
        return fault


def _read_csv(stream: io.BufferedReader[Any], path: Path, limits: Limits) -> Iterator[Row]:
    """Rows under a header line. An empty cell is an absent value: CSV has no other way to say it."""
    csv.field_size_limit(max(csv.field_size_limit(), limits.max_row_bytes))  # the module's own is one for all
    reader = csv.reader(_csv_lines(stream, path, limits), strict=True)
    header: list[str] | None = None
    while True:
        origin = f"{path.name}:{reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(
                "this is not CSV", where=origin, why=str(error), fix='check its quotes (")'
            ) from None
        if cells is None:
            return
        if header is None:
            header = _csv_header(cells, origin)
        elif cells:
            yield _csv_row(header, cells, origin, limits)


def _csv_lines(stream: io.BufferedReader[Any], path: Path, limits: Limits) -> Iterator[str]:
    offset = 0
    for number, line in bounded_lines(stream, limits.max_row_bytes):
        if line is None:
            fault = row_too_long(limits.max_row_bytes)
            raise DataError(
                "a line of this CSV is too long",
                where=f"{path.name}:{number}",
                why=fault.value,
                fix=fault.fix,
            )
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(error, f"{path.name}:{number}", offset + error.start) from None
        offset += len(line)


def _csv_header(cells: list[str], origin: str) -> list[str]:
    if "" in cells or len(set(cells)) < len(cells):
        fix = "give every column a name of its own in the first line"
        raise DataError(
            "the CSV header has an empty or repeated name", where=origin, why=head(cells), fix=fix
        )
    return cells


def _csv_row(header: list[str], cells: list[str], origin: str, limits: Limits) -> Row:
    if len(cells) != len(header):
        value = f"{len(cells)} cells under {len(header)} columns: {head(cells)}"
        return BadRow(origin, "cell-count", value, 'quote cells that hold commas or line breaks: "a, b"')
    return check_row({key: cell for key, cell in zip(header, cells, strict=True) if cell}, origin, limits)


def _read_parquet(stream: io.BufferedReader[Any], path: Path, limits: Limits) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        fix = "pip install 'lorasmith[parquet]'"
        raise SetupError(
            f"reading {path.name} needs pyarrow", why="it is an optional extra", fix=fix
        ) from None
    try:
        with _seekable(stream) as file:
            batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024)
            cells = (fields for batch in batches for fields in batch.to_pylist())
            yield from table_rows(cells, path.name, limits)
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise DataError(
            f"{path} is damaged or no Parquet file", why=str(error), fix="get the file again"
        ) from None


def table_rows(cells: Iterable[Mapping[str, Any]], name: str, limits: Limits) -> Iterator[Row]:
    """Rows of a table, which says "absent" by null: `name:1` is its first."""
    for number, fields in enumerate(cells, start=1):
        present = {key: value for key, value in fields.items() if value is not None}
        yield check_row(present, f"{name}:{number}", limits)


def _seekable(stream: io.BufferedReader[Any]) -> Any:
    """Parquet is read from its end, so what comes out of a .gz first goes to a file without a name."""
    if stream.seekable():
        return stream
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    shutil.copyfileobj(stream, unpacked)
    unpacked.seek(0)
    return unpacked


def _content_fault(fields: Mapping[str, Any], origin: str, max_depth: int) -> BadRow | None:
    pending: list[tuple[Any, str, int]] = [(fields, "", 1)]
    while pending:
        value, name, depth = pending.pop()
        if isinstance(value, str):
            found = _FORBIDDEN.search(value)
            if found:
                return _character_fault(value, found, name, origin)
        elif isinstance(value, dict | list):
            if depth > max_depth:
                return BadRow(origin, "too-deep", f"more than {max_depth} levels", "flatten the row")
            pending += _children(value, name, depth + 1)
    return None


def _children(value: dict[str, Any] | list[Any], name: str, depth: int) -> list[tuple[Any, str, int]]:
    if isinstance(value, list):
        return [(item, f"{name}[{index}]", depth) for index, item in enumerate(value)]
    keys = [(key, "a key", depth) for key in value if not key.isprintable()]
    return keys + [(item, f"{name}.{key}" if name else key, depth) for key, item in value.items()]


def _character_fault(value: str, found: re.Match[str], name: str, origin: str) -> BadRow:
    rule = "lone-surrogate" if found[0] >= "\ud800" else "control-character"
    around = value[max(0, found.start() - 10) : found.start() + 20]
    shown = f"{name} has U+{ord(found[0]):04X} at {found.start()}: {around!r}"
    return BadRow(origin, rule, shown, "remove the character; it is damage, not text")


def bad_rows_error(bad_rows: Sequence[BadRow], total: int, shown: int = 10) -> DataError:
    """All bad rows as one error: a count per rule, and the first rows of each."""
    lines = []
    for rule, count in Counter(row.rule for row in bad_rows).most_common():
        lines.append(f"{rule}: {count:,}")
        mine = [row for row in bad_rows if row.rule == rule]
        lines += [f"  {row.origin}  {row.value_head}  ({row.fix})" for row in mine[:shown]]
        lines += [f"  ... and {count - shown:,} more"] if count > shown else []
    return DataError(
        f"{len(bad_rows):,} of {total:,} rows cannot be trained on",
        where=bad_rows[0].origin,
        why="\n         ".join(lines),
        fix="repair them, or go on without them: --on-bad-row skip names each in rejects.jsonl",
    )
