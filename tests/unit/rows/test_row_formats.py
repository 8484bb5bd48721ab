"""Files of every kind and rows of every format become the same conversations."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from lorasmith.errors import ConfigError, DataError
from lorasmith.rows.conversation import RowRules, detect_format, to_conversation, unread_columns
from lorasmith.rows.records import BadRow, Record, read_records
from lorasmith.types import Conversation, Message

ROWS = [{"instruction": f"问 {number}, “x”\n", "output": f"答 {number}"} for number in range(3)]


def conversation(fields: dict[str, Any], row_format: str, **rules: Any) -> Conversation | BadRow:
    return to_conversation(Record(fields, "f:1"), RowRules(row_format, **rules))  # type: ignore[arg-type]


def turns(fields: dict[str, Any], row_format: str, **rules: Any) -> list[tuple[str, str]]:
    read = conversation(fields, row_format, **rules)
    assert isinstance(read, Conversation), read
    return [(message.role, message.content) for message in read.messages]


def write_rows(path: Path) -> None:
    """ROWS, in the kind of file that the name says."""
    packed = path.suffix == ".gz"
    kind = path.suffixes[-2] if packed else path.suffix
    plain = path.with_suffix("") if packed else path
    if kind == ".csv":
        with plain.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["instruction", "output"])
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind == ".parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="the extra is not installed")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), plain)
    elif kind == ".json":
        plain.write_text(json.dumps(ROWS, ensure_ascii=False, indent=1), encoding="utf-8")
    else:
        plain.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    if packed:
        path.write_bytes(gzip.compress(plain.read_bytes()))


ORIGINS = {".json": [2, 6, 10], ".jsonl": [1, 2, 3], ".csv": [2, 4, 6], ".parquet": [1, 2, 3]}


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("kind", ORIGINS)
def test_every_kind_of_file_gives_the_same_rows_with_their_places(
    tmp_path: Path, kind: str, packed: str
) -> None:
    path = tmp_path / f"rows{kind}{packed}"
    write_rows(path)
    rows = list(read_records(path))
    assert [row.fields for row in rows if isinstance(row, Record)] == ROWS
    assert [row.origin for row in rows] == [f"{path.name}:{line}" for line in ORIGINS[kind]]


def test_rows_on_one_line_of_an_array_are_told_apart_by_column(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"a": "1"}, {"a": "2"},\n {"a": "3"}]')
    assert [row.origin for row in read_records(path)] == ["rows.json:1", "rows.json:1:14", "rows.json:2"]


@pytest.mark.parametrize(
    "array", ['[{"a": "1"},\n{"a": "2"}]', '[\n{"a": "1"}, {"a": "2"}]', '[{"a": "1"}, {"a": "2"}]']
)
def test_an_array_under_the_name_of_lines_is_read_as_an_array(tmp_path: Path, array: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(array)
    assert [row.fields for row in read_records(path) if isinstance(row, Record)] == [{"a": "1"}, {"a": "2"}]


def test_lines_under_the_name_of_an_array_are_read_as_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('{"a": "1"}\n{"a": "2"}\n')
    assert [row.origin for row in read_records(path)] == ["rows.json:1", "rows.json:2"]


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_where_the_file_is_cut_into_chunks_changes_nothing(size: int) -> None:
    from lorasmith.rows.strict_json import JsonFault, array_elements

    rows = [
        '{"a": "x } ] , \\" y"}',
        '{"b": [1, {"c": "\\\\"}]}',
        "12345",
        '{"a": NaN, "b": "} {"}',
        '"t"',
        "[]",
    ]
    text = "[" + ",\n".join(rows) + "]"
    chunks = (text[start : start + size] for start in range(0, len(text), size))
    elements = list(array_elements(chunks, 10_000))
    values = ["fault" if isinstance(value, JsonFault) else value for _, value in elements]
    assert values == [{"a": 'x } ] , " y'}, {"b": [1, {"c": "\\"}]}, 12345, "fault", "t", []]
    assert [place for place, _ in elements] == ["1", "2", "3", "4", "5", "6"]


QA = [("user", "q"), ("assistant", "a")]
HUMAN_GPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
USER_ASSISTANT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("fields", "row_format"),
    [
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca"),
        ({"instruction": "", "input": "q", "output": "a"}, "alpaca"),
        ({"instrution": "q", "output": "a"}, "alpaca"),
        ({"conversations": HUMAN_GPT}, "sharegpt"),
        ({"conversations": USER_ASSISTANT}, "sharegpt"),
        ({"messages": USER_ASSISTANT}, "messages"),
        ({"prompt": "q", "completion": "a"}, "prompt-completion"),
        ({"query": "q", "response": "a"}, "prompt-completion"),
        ({"prompt": USER_ASSISTANT[:1], "completion": USER_ASSISTANT[1:]}, "prompt-completion"),
    ],
)
def test_formats_are_detected_and_read(fields: dict[str, Any], row_format: str) -> None:
    assert detect_format([Record(fields, "f:1")], {}).format == row_format
    assert turns(fields, row_format) == QA


def test_instruction_and_input_are_joined_as_told() -> None:
    row = {"instruction": "translate", "input": "x", "output": "a"}
    assert turns(row, "alpaca")[0] == ("user", "translatex")
    assert turns(row, "alpaca", input_separator="\n")[0] == ("user", "translate\nx")
    assert turns(row | {"input": ""}, "alpaca", input_separator="\n")[0] == ("user", "translate")


def test_history_comes_first_and_its_answers_are_answers() -> None:
    row = {"instruction": "q3", "output": "a3", "history": [["q1", "a1"], ["q2", "a2"]]}
    assert turns(row, "alpaca") == [
        (role, f"{role[0] if role[0] == 'a' else 'q'}{n}")
        for n in (1, 2, 3)
        for role in ("user", "assistant")
    ]


@pytest.mark.parametrize(
    ("fields", "row_format", "system"),
    [
        ({"instruction": "q", "output": "a"}, "alpaca", "told"),
        ({"instruction": "q", "output": "a", "system": ""}, "alpaca", "told"),
        ({"instruction": "q", "output": "a", "system": "own"}, "alpaca", "own"),
        ({"conversations": HUMAN_GPT, "system": "own"}, "sharegpt", "own"),
        ({"messages": [{"role": "system", "content": "own"}, *USER_ASSISTANT]}, "messages", "own"),
    ],
)
def test_the_told_system_prompt_stands_in_only_where_there_is_none(
    fields: dict[str, Any], row_format: str, system: str
) -> None:
    assert turns(fields, row_format, system="told") == [("system", system), *QA]


def test_a_system_column_beside_a_system_turn_is_refused() -> None:
    read = conversation(
        {"messages": [{"role": "system", "content": "s"}, *USER_ASSISTANT], "system": "t"}, "messages"
    )
    assert isinstance(read, BadRow)
    assert read.rule == "two-systems"


def test_columns_can_be_named() -> None:
    columns = {"instruction": "question", "output": "reply"}
    row = Record({"question": "q", "reply": "a", "output": "not this"}, "f:1")
    assert detect_format([row], columns).format == "alpaca"
    rules = RowRules("alpaca", columns)
    read = to_conversation(row, rules)
    assert isinstance(read, Conversation)
    assert read.messages == (Message("user", "q"), Message("assistant", "a"))
    assert list(unread_columns(row, rules)) == ["output (not mapped)"]


def test_a_column_of_no_format_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="did you mean 'instruction'"):
        detect_format([Record({"a": "b"}, "f:1")], {"instuction": "a"})


def test_unclear_formats_are_refused_with_the_columns() -> None:
    with pytest.raises(DataError, match=r"(?s)'answer', 'question'.*data.columns"):
        detect_format([Record({"question": "q", "answer": "a"}, "f:1")], {})
    both = {"instruction": "q", "output": "a", "messages": []}
    with pytest.raises(DataError, match=r"(?s)more than one.*data.format alpaca or messages"):
        detect_format([Record(both, "f:1")], {})


def test_what_is_not_read_is_named() -> None:
    row = {
        "messages": [{"role": "user", "content": "q", "name": "Bob", "weight": None}],
        "id": 3,
        "output": "x",
    }
    assert list(unread_columns(Record(row, "f:1"), RowRules("messages"))) == [
        "id",
        "output",
        "messages[].name",
    ]
    both = {"instruction": "q", "instrution": "p", "output": "a"}
    assert list(unread_columns(Record(both, "f:1"), RowRules("alpaca"))) == ["instrution"]
