"""Law 7: the prompt of generation is, id by id, the prefix of what was trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from chat_texts import FORMATS, make_format, texts_for

from lorasmith.errors import DataError
from lorasmith.families import find_family
from lorasmith.text.loading import load_tokenizer
from lorasmith.text.template import ChatFormat
from lorasmith.types import IGNORE_INDEX, Conversation, Message

ROWS = 300


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
    texts = texts_for(chat_format.tokenizer, 4 * ROWS, seed=7)
    proven = sum(is_prefix(chat_format, texts[4 * row : 4 * row + 4]) for row in range(ROWS))
    assert proven > ROWS / 3


def is_prefix(chat_format: ChatFormat, contents: list[str]) -> bool:
    roles = ("user", "assistant", "user", "assistant")
    messages = tuple(Message(role, text) for role, text in zip(roles, contents, strict=True))  # type: ignore[arg-type]
    try:
        trained = chat_format.encode(Conversation(messages, "row 1"))
    except DataError:  # refused rather than trained askew; never by a family's own format
        if not chat_format.joint_text:
            raise
        return False
    for turn in (1, 3):
        prompt = chat_format.encode(Conversation(messages[:turn], "row 1"), for_generation=True).input_ids
        assert np.array_equal(prompt, trained.input_ids[: len(prompt)])
        begins_here = trained.labels[len(prompt) - 1]
        assert begins_here != IGNORE_INDEX
        assert (trained.labels[: len(prompt) - 1] != IGNORE_INDEX).any() == (
            turn == 3
        ) or "tutorial" in chat_format.name
    return True
