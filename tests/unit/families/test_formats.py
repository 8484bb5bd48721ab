from __future__ import annotations

from pathlib import Path

import pytest
from chat_texts import LIKE, make_format

from lorasmith.errors import DataError
from lorasmith.text.template import ChatFormat
from lorasmith.types import IGNORE_INDEX, Conversation, Message

TALK = (
    Message("user", "Hi"),
    Message("assistant", "Hello, you"),
    Message("user", "1+1?"),
    Message("assistant", "2"),
)


def written(chat_format: ChatFormat, messages: tuple[Message, ...], *, for_generation: bool = False) -> str:
    pieces = chat_format.pieces(messages, for_generation=for_generation)
    names = {token_id: token for token, token_id in chat_format.tokenizer.special_tokens.items()}
    return "".join(
        piece.content if isinstance(piece.content, str) else names[piece.content] for piece in pieces
    )


def trained(chat_format: ChatFormat, messages: tuple[Message, ...]) -> str:
    labels = chat_format.encode(Conversation(messages, "row")).labels
    return chat_format.tokenizer.decode([i for i in labels if i != IGNORE_INDEX], skip_special=False)


def test_llama3_tutorial_of_several_turns(tmp_path: Path) -> None:
    chat_format = make_format(tmp_path, "llama3", "tutorial")
    assert trained(chat_format, TALK) == "Hello, you<|eot_id|>2<|eot_id|><|end_of_text|>"
    assert not written(chat_format, TALK).startswith("<|begin_of_text|>")


def test_deepseek_tutorial_of_several_turns(tmp_path: Path) -> None:
    chat_format = make_format(tmp_path, "deepseek", "tutorial")
    eos = "<｜end▁of▁sentence｜>"
    system = (Message("system", "Be kind."), *TALK)
    assert written(chat_format, system) == (
        f"Be kind.\n\nUser: Hi\n\nAssistant: Hello, you{eos}User: 1+1?\n\nAssistant: 2{eos}{eos}"
    )
    assert written(chat_format, TALK[:1], for_generation=True) == "User: Hi\n\nAssistant:"


def test_deepseek_role_markers_are_plain_text(tmp_path: Path) -> None:
    chat_format = make_format(tmp_path, "deepseek", "official")
    assert all(marker in "a\n\nUser: b\n\nAssistant: c" for marker in chat_format.role_markers)
    assert not make_format(tmp_path / "other", "llama3", "official").role_markers


@pytest.mark.parametrize("family", LIKE)
@pytest.mark.parametrize("name", ["official", "tutorial"])
def test_an_answer_is_read_as_it_was_written(tmp_path: Path, family: str, name: str) -> None:
    chat_format = make_format(tmp_path, family, name)
    example = chat_format.encode(Conversation(TALK[:2], "row"))
    prompt = chat_format.encode(Conversation(TALK[:1], "row"), for_generation=True)
    answer = example.labels[len(prompt) - 1 :].tolist()
    assert chat_format.read_answer(chat_format.tokenizer.decode(answer)) == "Hello, you"


@pytest.mark.parametrize("family", LIKE)
@pytest.mark.parametrize("name", ["official", "tutorial"])
def test_the_last_message_need_not_be_an_answer(tmp_path: Path, family: str, name: str) -> None:
    chat_format = make_format(tmp_path, family, name)
    assert chat_format.encode(Conversation(TALK[:3], "row")).num_targets
    assert chat_format.encode(Conversation(TALK[1:], "row")).num_targets
    for messages in (TALK[:1], ()):
        with pytest.raises(DataError) as caught:
            chat_format.encode(Conversation(messages, "talks.json:4"))
        assert caught.value.where == "talks.json:4"
