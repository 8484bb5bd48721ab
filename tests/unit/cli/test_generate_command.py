from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from byte_chat import byte_model, random_llama, speaking_model

from lorasmith.cli.generate import opened, refuse_overwriting, write_answers
from lorasmith.cli.prompts import read_prompts
from lorasmith.config import GenerateConfig
from lorasmith.errors import ConfigError, DataError, SetupError, StorageError
from lorasmith.infer.generate import encode_prompts, generate
from lorasmith.types import Message

GREEDY = GenerateConfig(greedy=True, max_new_tokens=6)


def write_lines(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def test_prompts_and_messages_are_read_and_other_keys_kept(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "你是谁？"}]
    lines = [json.dumps({"prompt": "hi", "id": 7}), "", json.dumps({"messages": messages})]
    first, second = read_prompts(write_lines(tmp_path / "p.jsonl", *lines))
    assert first.fields == {"prompt": "hi", "id": 7}
    assert first.conversation.messages == (Message("user", "hi"),)
    assert second.conversation.messages == (Message("system", "S"), Message("user", "你是谁？"))
    assert second.conversation.origin == "p.jsonl:3"


def test_prompts_come_from_standard_input_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO('{"prompt": "嬛"}\n'.encode())))
    assert read_prompts("-")[0].conversation.origin == "stdin:1"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "Expecting"),
        ("[1]", "is a list, not an object"),
        ("{}", 'needs either "prompt" or "messages"'),
        ('{"prompt": "a", "messages": []}', 'needs either "prompt" or "messages"'),
        ('{"prompt": 5}', "content must be text"),
        ('{"messages": []}', '"messages" must be a list'),
        ('{"messages": [{"role": "user"}]}', 'must have "role" and "content"'),
        ('{"messages": [{"role": "king", "content": "a"}]}', "role must be one of"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "nothing to answer"),
        ('{"prompt": "a", "answer": "b"}', "already has 'answer'"),
        (r'{"prompt": "\ud83d"}', "lone surrogate"),
        ("[" * 100_000, "too-deep"),
    ],
)
def test_bad_lines_are_named_by_file_and_line(tmp_path: Path, line: str, why: str) -> None:
    path = write_lines(tmp_path / "p.jsonl", '{"prompt": "good"}', line)
    with pytest.raises(DataError) as caught:
        read_prompts(path)
    assert "p.jsonl:2" in str(caught.value)
    assert why in str(caught.value)


def test_all_bad_lines_are_counted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"12 lines are no prompts") as caught:
        read_prompts(write_lines(tmp_path / "p.jsonl", *["{}"] * 12))
    assert "and 2 more" in str(caught.value)


def test_a_file_that_is_absent_empty_or_not_utf8(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="there is no file"):
        read_prompts(str(tmp_path / "absent.jsonl"))
    with pytest.raises(DataError, match="there are no prompts"):
        read_prompts(write_lines(tmp_path / "empty.jsonl", "", ""))
    (tmp_path / "gbk.jsonl").write_bytes(b'{"prompt": "a"}\n' + '{"prompt": "嬛"}'.encode("gb18030"))
    with pytest.raises(DataError, match="not UTF-8") as caught:
        read_prompts(str(tmp_path / "gbk.jsonl"))
    assert caught.value.where.endswith("gbk.jsonl:2")


def test_answers_follow_their_prompts_batch_by_batch(tmp_path: Path) -> None:
    model = byte_model(random_llama())
    texts = ["one", "a longer prompt", "x", "four", "the last of five"]
    rows = read_prompts(
        write_lines(tmp_path / "p.jsonl", *(json.dumps({"prompt": t, "id": t}) for t in texts))
    )
    prompts = encode_prompts(model, [row.conversation for row in rows])
    path = tmp_path / "new" / "answers.jsonl"
    with opened(str(path), force=False) as file:
        on_disk = []
        for done in write_answers(model, rows, prompts, GREEDY, file, batch_size=2):
            on_disk.append((done, len(path.read_text(encoding="utf-8").splitlines())))
    assert on_disk == [(2, 2), (4, 4), (5, 5)]
    written = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    expected = generate(model, [[Message("user", text)] for text in texts], GREEDY)
    assert [row["id"] for row in written] == texts
    assert [row["answer"] for row in written] == [answer.content for answer in expected]
    assert [row["num_prompt_tokens"] for row in written] == [len(text) + 2 for text in texts]
    assert {row["finish_reason"] for row in written} <= {"stop", "length"}


def test_chinese_is_written_as_it_is(tmp_path: Path) -> None:
    model = speaking_model("é中")
    rows = read_prompts(write_lines(tmp_path / "p.jsonl", '{"prompt": "嬛"}'))
    out = io.StringIO()
    prompts = encode_prompts(model, [row.conversation for row in rows])
    list(write_answers(model, rows, prompts, GREEDY, out, batch_size=8))
    assert out.getvalue().startswith('{"prompt": "嬛", "answer": "é中", "finish_reason": "stop"')


def test_an_existing_output_is_kept_unless_forced(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text("precious")
    with pytest.raises(ConfigError, match="exists already"):
        refuse_overwriting(str(path), force=False)
    refuse_overwriting(str(path), force=True)
    refuse_overwriting("-", force=False)
    with opened(str(path), force=True) as file:
        file.write("new")
    assert path.read_text() == "new"


def test_a_disk_that_refuses_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be written"), opened(str(tmp_path / "file/a"), force=True):
        pass
