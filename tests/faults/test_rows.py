"""Every kind of bad row and bad file, each told with its line (reliability table, rows 11 and 22 to 26)."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorasmith.errors import DataError
from lorasmith.rows.conversation import RowRules, to_conversation
from lorasmith.rows.records import BadRow, Record, read_records
from lorasmith.rows.source import Limits
from lorasmith.types import Conversation

Passed = Callable[[str], None]
GOOD = '{"instruction": "你是谁？", "input": "", "output": "甄嬛。"}'


def rules_of(path: Path, row_format: str = "alpaca", **limits: int) -> dict[str, str]:
    """{origin: rule} of the bad rows of a file."""
    rules = RowRules(row_format)  # type: ignore[arg-type]
    rows = read_records(path, limits=Limits(**limits))
    read = [to_conversation(row, rules) if isinstance(row, Record) else row for row in rows]
    return {row.origin: row.rule for row in read if isinstance(row, BadRow)}


def write(path: Path, *lines: str | bytes, sep: bytes = b"\n") -> Path:
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + sep for line in lines))
    return path


ALPACA_ROWS = [
    # wrong types, null, missing, empty
    ('{"instruction": "q", "output": 5}', "wrong-type"),
    ('{"instruction": "q", "output": 5.5}', "wrong-type"),
    ('{"instruction": "q", "output": true}', "wrong-type"),
    ('{"instruction": "q", "output": null}', "wrong-type"),
    ('{"instruction": "q", "output": ["a"]}', "wrong-type"),
    ('{"instruction": "q", "output": {"a": "b"}}', "wrong-type"),
    ('{"instruction": 1, "output": "a"}', "wrong-type"),
    ('{"instruction": null, "output": "a"}', "wrong-type"),
    ('{"instruction": "q", "input": null, "output": "a"}', "wrong-type"),
    ('{"instruction": "q", "input": ["x"], "output": "a"}', "wrong-type"),
    ('{"instruction": "q", "output": "a", "system": 7}', "wrong-type"),
    ('{"instruction": "q"}', "missing-field"),
    ('{"output": "a"}', "missing-field"),
    ('{"something": "else"}', "missing-field"),
    ('{"instruction": "q", "output": ""}', "empty-text"),
    ('{"instruction": "q", "output": " \\n "}', "empty-text"),
    ('{"instruction": "", "input": "", "output": "a"}', "empty-text"),
    # history
    ('{"instruction": "q", "output": "a", "history": "x"}', "wrong-type"),
    ('{"instruction": "q", "output": "a", "history": null}', "wrong-type"),
    ('{"instruction": "q", "output": "a", "history": [["only"]]}', "wrong-type"),
    ('{"instruction": "q", "output": "a", "history": [["a", 1]]}', "wrong-type"),
    ('{"instruction": "q", "output": "a", "history": [{"q": "a"}]}', "wrong-type"),
    ('{"instruction": "q", "output": "a", "history": [["", "a"]]}', "empty-text"),
    # not rows at all
    ("[]", "not-an-object"),
    ('["a", "b"]', "not-an-object"),
    ('"text"', "not-an-object"),
    ("5", "not-an-object"),
    ("null", "not-an-object"),
    ("{}", "empty-row"),
    # JSON that is not JSON
    ('{"instruction": "q", "instruction": "p", "output": "a"}', "duplicate-key"),
    ('{"instruction": "q", "output": "a", "history": [{"k": 1, "k": 2}]}', "duplicate-key"),
    ('{"instruction": "q", "output": NaN}', "not-json-number"),
    ('{"instruction": "q", "output": Infinity}', "not-json-number"),
    ('{"instruction": "q", "output": -Infinity}', "not-json-number"),
    ('{"instruction": "q", "output": 1e400}', "number-range"),
    ('{"instruction": "q", "output": ' + "9" * 5000 + "}", "number-range"),
    ('{"instruction": "q", "output": "a"', "broken-json"),
    ('{"instruction": "q" "output": "a"}', "broken-json"),
    ('{"instruction": "q", "output": "he said "no" to me"}', "broken-json"),
    ("{'instruction': 'q', 'output': 'a'}", "broken-json"),
    ('{"instruction": "q", "output": "a",}', "broken-json"),
    ('{"instruction": "q", "output": "\\x41"}', "broken-json"),
    (GOOD + GOOD, "extra-data"),
    (GOOD + ",", "extra-data"),
    # characters
    (b'{"instruction": "q", "output": "a\xff"}', "not-utf8"),
    ('{"instruction": "你好", "output": "皇上万福"}'.encode("gb18030"), "not-utf8"),
    (b'{"instruction": "q", "output": "\xed\xa0\x80"}', "not-utf8"),
    ('{"instruction": "q", "output": "\\ud83d"}', "lone-surrogate"),
    ('{"instruction": "q", "output": "\\udc00 a"}', "lone-surrogate"),
    ('{"instruction": "q", "output": "a\\u0000b"}', "control-character"),
    ('{"instruction": "q", "output": "a\\u001bb"}', "control-character"),
    ('{"instruction": "q", "output": "a\\u007fb"}', "control-character"),
    ('{"instruction": "q", "output": "a\x00b"}', "control-character"),
    ('{"instruction": "q", "output": "a\tb"}', "control-character"),
    ('{"instruction": "q", "output": "a\x1b[31mb"}', "control-character"),
    ('{"instruction": "q", "output": "a", "x": {"y": ["\\u0007"]}}', "control-character"),
    ('{"instruction": "q", "output": "a", "k\\u0000": 1}', "control-character"),
    # size
    ('{"instruction": "q", "output": ' + "[" * 70 + "]" * 70 + "}", "too-deep"),
    ('{"instruction": "q", "output": ' + "[" * 2000 + "]" * 2000 + "}", "too-deep"),
    ('{"instruction": "q", "output": "' + "a" * 20_000 + '"}', "row-too-long"),
]


@pytest.mark.parametrize(("line", "rule"), ALPACA_ROWS)
def test_each_bad_line_is_told_with_its_number_and_the_others_go_on(
    tmp_path: Path, passed: Passed, line: str | bytes, rule: str
) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD, "", line, GOOD)
    assert rules_of(path, max_row_bytes=10_000) == {"rows.jsonl:3": rule}
    passed("bad_rows")


# These break the array itself, or are no element of one.
NOT_IN_ARRAYS = {"extra-data", "not-utf8"}
IN_ARRAYS = [
    (line, rule)
    for line, rule in ALPACA_ROWS
    if rule not in NOT_IN_ARRAYS and line != '{"instruction": "q", "output": "a"'
]


@pytest.mark.parametrize(("element", "rule"), IN_ARRAYS)
def test_each_bad_array_element_is_told_with_its_line_and_the_others_go_on(
    tmp_path: Path, passed: Passed, element: str, rule: str
) -> None:
    path = write(tmp_path / "rows.json", "[", GOOD + ",", "", element + ",", GOOD, "]")
    assert rules_of(path, max_row_bytes=10_000) == {"rows.json:4": rule}
    assert sum(isinstance(row, Record) and row.origin == "rows.json:5" for row in read_records(path)) == 1
    passed("bad_rows")


USER, ANSWER, SYSTEM = (
    f'{{"role": "{role}", "content": "text"}}' for role in ("user", "assistant", "system")
)
CHATS = [
    (f"[{ANSWER}]", "starts-with-answer"),
    (f"[{ANSWER}, {USER}]", "starts-with-answer"),
    (f"[{USER}]", "no-answer"),
    (f"[{SYSTEM}]", "no-answer"),
    (f"[{USER}, {USER}, {ANSWER}]", "same-role-twice"),
    (f"[{USER}, {ANSWER}, {ANSWER}]", "same-role-twice"),
    (f"[{USER}, {ANSWER}, {USER}]", "ends-with-question"),
    (f"[{USER}, {SYSTEM}, {ANSWER}]", "system-not-first"),
    (f"[{SYSTEM}, {SYSTEM}, {USER}, {ANSWER}]", "system-not-first"),
    ('[{"role": "narrator", "content": "a"}]', "unknown-role"),
    ('[{"role": "User", "content": "a"}]', "unknown-role"),
    ('[{"role": 5, "content": "a"}]', "wrong-type"),
    ('[{"content": "a"}]', "missing-field"),
    ('[{"role": "user"}]', "missing-field"),
    ('[{"role": "tool", "content": "a"}]', "tool-role"),
    ('[{"role": "function", "content": "a"}]', "tool-role"),
    ('[{"role": "assistant", "content": null, "tool_calls": [{"id": "x"}]}]', "tool-role"),
    ('[{"role": "user", "content": ""}]', "empty-text"),
    ('[{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]', "empty-text"),
    ('[{"role": "user", "content": [{"type": "text", "text": "q"}]}]', "wrong-type"),
    ('["hello"]', "wrong-type"),
    ('"hello"', "wrong-type"),
    ("[]", "no-messages"),
]


@pytest.mark.parametrize(("messages", "rule"), CHATS)
def test_each_wrong_conversation_is_told(tmp_path: Path, passed: Passed, messages: str, rule: str) -> None:
    path = write(tmp_path / "chat.jsonl", "", f'{{"messages": {messages}}}')
    assert rules_of(path, "messages") == {"chat.jsonl:2": rule}
    passed("bad_rows")


def test_ten_thousand_turns_are_read_and_one_more_pair_is_not(tmp_path: Path) -> None:
    pair = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    rows = [json.dumps({"conversations": pair * count}) for count in (5_000, 5_001)]
    path = write(tmp_path / "long.jsonl", *rows)
    assert rules_of(path, "sharegpt") == {"long.jsonl:2": "too-many-messages"}


GOOD_BYTES = {
    "byte order mark": b"\xef\xbb\xbf" + GOOD.encode() + b"\n",
    "carriage returns": GOOD.encode() + b"\r\n" + GOOD.encode() + b"\r\n",
    "no last line feed": GOOD.encode(),
    "blank lines": b"\n\n" + GOOD.encode() + b"\n  \n",
    "line separator in a text": '{"instruction": "a\u2028b\u0085c", "output": "a\u2029"}\n'.encode(),
    "escaped line breaks": b'{"instruction": "a\\n\\r\\tb", "output": "a"}\n',
    "surrogate pair": b'{"instruction": "a", "output": "\\ud83d\\ude00"}\n',
    "bidi and zero width": '{"instruction": "a\u202eb\u200bc", "output": "\ufeffa"}\n'.encode(),
}


@pytest.mark.parametrize("content", GOOD_BYTES.values(), ids=GOOD_BYTES.keys())
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_unusual_but_right_bytes_are_read(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content)
    rows = list(read_records(path))
    assert rows
    assert all(isinstance(to_conversation(row, RowRules("alpaca")), Conversation) for row in rows)  # type: ignore[arg-type]


DAMAGED_FILES = {
    "empty": (b"", "is empty"),
    "only blank lines": (b"\n\n \n", "has no rows"),
    "empty array": (b"[ ]", "has no rows"),
    "cut array": (f"[{GOOD},\n{GOOD[:20]}".encode(), r"rows\.json:2"),
    "array without end": (f"[{GOOD},\n{GOOD}".encode(), r"rows\.json:2"),
    "one object over many lines": (b'{\n"data": []\n}', "one object, not rows"),
    "comma too many": (f"[{GOOD},\n{GOOD},\n]".encode(), r"rows\.json:3"),
    "comma missing": (f"[{GOOD}\n{GOOD}]".encode(), r"rows\.json:2"),
    "text behind the array": (f"[{GOOD}]\n{GOOD}".encode(), r"rows\.json:2"),
    "utf-16 with a mark": (f"[{GOOD}]".encode("utf-16"), "UTF-16"),
    "utf-16 without a mark": ('[{"instruction": "abc"}]'.encode("utf-16-le"), "UTF-16"),
    "utf-32": (f"[{GOOD}]".encode("utf-32"), "UTF-32"),
    "gb18030": (b"[\n" + GOOD.encode("gb18030") + b"]", r"(?s)rows\.json:2, byte 19.*GB18030"),
    "latin-1": ('[\n\n{"a": "déjà vu, garçon"}]'.encode("latin-1"), r"(?s)rows\.json:3, byte 11.*Latin-1"),
    "gzip under another name": (gzip.compress(GOOD.encode()), r"end in \.gz"),
    "element above the limit": (b"[\n" + b'{"a": "' + b"x" * 200_000, r"rows\.json:2"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED_FILES.values(), ids=DAMAGED_FILES.keys())
def test_a_damaged_file_is_refused_with_its_place(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_records(path, limits=Limits(max_row_bytes=100_000)))
    assert caught.value.fix or "array" in caught.value.what


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(JSON_VALUES, min_size=1, max_size=6),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
)
def test_any_json_is_read_as_it_stands_or_told(
    tmp_path: Path, rows: list[Any], indent: int | None, ascii_only: bool
) -> None:
    lines, array = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    rows = [{"first": "row"}, *rows]  # a .jsonl that begins with a list may be a misnamed array
    write(lines, *[json.dumps(row, ensure_ascii=ascii_only) for row in rows])
    array.write_text(json.dumps(rows, ensure_ascii=ascii_only, indent=indent), encoding="utf-8")
    for path in (lines, array):
        read = list(read_records(path))
        assert len(read) == len(rows)
        assert len({row.origin for row in read}) == len(rows)
        assert all(
            isinstance(told, BadRow) or told.fields == row for told, row in zip(read, rows, strict=True)
        )
    assert [row.origin.split(":")[1] for row in read_records(lines)] == [str(n + 1) for n in range(len(rows))]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=st.binary(min_size=1, max_size=12), place=st.integers(0, 180))
def test_no_damage_ends_in_anything_but_a_told_error(tmp_path: Path, damage: bytes, place: int) -> None:
    sound = f"[{GOOD},\n{GOOD},\n{GOOD}]".encode()
    for name in ("rows.json", "rows.jsonl", "rows.csv"):
        path = tmp_path / name
        path.write_bytes(sound[:place] + damage + sound[place:])
        with suppress(DataError):
            assert all(row.origin.startswith(f"{name}:") for row in read_records(path))


def test_a_cut_last_line_is_told_as_cut(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD + "\n" + GOOD[:30], encoding="utf-8")
    assert rules_of(path) == {"rows.jsonl:2": "cut-off"}


@pytest.mark.parametrize("kind", ["missing", "directory", "pipe", "device"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "rows.json"
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    start = time.monotonic()
    with pytest.raises(DataError, match="no data file" if kind == "missing" else "not a regular file"):
        list(read_records(path))
    assert time.monotonic() - start < 1


def test_an_unknown_kind_of_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\.jsonl"):
        list(read_records(write(tmp_path / "rows.xlsx", GOOD)))


@pytest.mark.parametrize("cut", [True, False])
def test_damaged_gzip_is_told(tmp_path: Path, cut: bool) -> None:
    packed = gzip.compress((GOOD + "\n").encode() * 500)
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(packed[: len(packed) // 2] if cut else packed[:20] + b"\x00\x00\x00" + packed[23:])
    with pytest.raises(DataError, match="damaged gzip"):
        list(read_records(path))


def test_a_gzip_bomb_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wb") as file:
        for _ in range(100):
            file.write(b"x" * (1 << 20))
    with pytest.raises(DataError, match="grows without bound"):
        list(read_records(path))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["line", "array", "csv"])
def test_a_gigabyte_in_one_row_needs_little_memory(tmp_path: Path, layout: str) -> None:
    path = tmp_path / {"line": "rows.jsonl", "array": "rows.json", "csv": "rows.csv"}[layout]
    with path.open("wb") as file:
        file.write({"line": b'{"a": "', "array": b'[{"a": "', "csv": b'instruction,output\n"'}[layout])
        file.truncate(1 << 30)  # the rest is a hole: NUL bytes that take no disk
    script = f"""
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
        from pathlib import Path
        from lorasmith.rows.records import read_records
        from lorasmith.errors import DataError
        try:
            print([row.rule for row in read_records(Path({str(path)!r}))])
        except DataError as error:
            print(error.where)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    told = {"line": "['row-too-long']", "array": "rows.json:1", "csv": "rows.csv:2"}[layout]
    assert run.stdout.strip() == told, run.stderr


CSV_ROWS = [
    ("q,,a,extra", "cell-count"),
    ("q,a", "cell-count"),
    ("q,,", "missing-field"),
    (",,a", "missing-field"),
    ("q,, ", "empty-text"),
    ("q,,a\x00b", "control-character"),
]


@pytest.mark.parametrize(("line", "rule"), CSV_ROWS)
def test_each_bad_csv_row_is_told_with_the_line_it_begins_on(
    tmp_path: Path, passed: Passed, line: str, rule: str
) -> None:
    path = write(tmp_path / "rows.csv", "instruction,input,output", '"two', 'lines",,a', line, "q,,a")
    assert rules_of(path) == {"rows.csv:4": rule}
    passed("bad_rows")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([b'a,b\n1,"open', b"2,3"], r"rows\.csv:2"),
        ([b"a,a", b"1,2"], "repeated name"),
        ([b"a,", b"1,2"], "empty or repeated"),
        ([b"a,b"], "has no rows"),
        ([b"a,b", "你,好".encode("gb18030")], r"(?s)rows\.csv:2, byte 4.*GB18030"),
    ],
)
def test_a_damaged_csv_is_refused(tmp_path: Path, lines: list[bytes], message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(read_records(write(tmp_path / "rows.csv", *lines)))


def test_a_damaged_parquet_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="the extra is not installed")
    with pytest.raises(DataError, match="no Parquet file"):
        list(read_records(write(tmp_path / "rows.parquet", "PAR1 and then nothing")))
