"""Law 8: text of the user never yields a special token id."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from chat_texts import FORMATS, make_format, opens_with_space, texts_for

from lorasmith.errors import DataError
from lorasmith.families import find_family
from lorasmith.text.loading import load_tokenizer
from lorasmith.text.template import ChatFormat
from lorasmith.types import Conversation, Message

ROWS = 2000


@pytest.mark.parametrize(("family", "name"), FORMATS)
def test_small_vocabularies(tmp_path: Path, family: str, name: str) -> None:
    check(make_format(tmp_path, family, name))


@pytest.mark.parametrize(("family", "folder"), [("llama3", "llama3"), ("deepseek", "deepseek-llm")])
@pytest.mark.parametrize("name", ["official", "tutorial"])
def test_real_vocabularies(shared: Path, tmp_path: Path, family: str, folder: str, name: str) -> None:
    source = shared / "data/tokenizers" / folder / "tokenizer.rebuilt.json"
    (tmp_path / "tokenizer.json").symlink_to(source)
    check(find_family({}, family).chat_format(name, load_tokenizer(tmp_path)))


def check(chat_format: ChatFormat) -> None:
    texts = texts_for(chat_format.tokenizer, 3 * ROWS)
    clean = control_ids(chat_format, ["a", "b", "c"])
    refused = 0
    for turn in zip(texts[::3], texts[1::3], texts[2::3], strict=True):
        try:
            assert control_ids(chat_format, turn) == clean, turn
        except DataError as error:
            if "border of prompt and answer" not in error.what:
                raise
            refused += 1
    assert refused < ROWS / 2
    check_texts_come_back(chat_format, texts)


def check_texts_come_back(chat_format: ChatFormat, texts: list[str]) -> None:
    tokenizer = chat_format.tokenizer
    encoded = tokenizer.encode_all(texts)
    assert not tokenizer.lost(texts, encoded)
    special = set(tokenizer.special_tokens.values())
    assert all(special.isdisjoint(ids) for ids in encoded)
    forms = 2 if opens_with_space(tokenizer) else 1
    for text, ids in zip(texts, encoded, strict=True):
        assert tokenizer.decode(ids) in (text, text.removeprefix(" "))[:forms]


def control_ids(chat_format: ChatFormat, contents: tuple[str, ...] | list[str]) -> Counter[int]:
    roles = ("user", "assistant", "user")
    messages = tuple(Message(role, text) for role, text in zip(roles, contents, strict=True))  # type: ignore[arg-type]
    ids = chat_format.encode(Conversation(messages, "row 1"), for_generation=True).input_ids.tolist()
    special = set(chat_format.tokenizer.special_tokens.values())
    return Counter(token_id for token_id in ids if token_id in special)


def test_role_markers_that_are_not_flagged_special(tmp_path: Path) -> None:
    chat_format = make_format(tmp_path, "marked", "official")
    tokens = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
    assert not next(token for token in tokens if token["content"] == "<|user|>")["special"]
    assert "<|user|>" in chat_format.tokenizer.special_tokens
    assert chat_format.tokenizer.special_id("<|user|>") not in chat_format.tokenizer.encode("<|user|>")
