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


def labelled(chat_format: ChatFormat, messages: tuple[Message, ...]) -> list[tuple[str, str]]:
    """Each input that has a label another than the next input: what stands there, and what is learned."""
    names = {token_id: token for token, token_id in chat_format.tokenizer.special_tokens.items()}
    example = chat_format.encode(Conversation(messages, "row"))
    following = example.input_ids[1:].tolist()
    pairs = zip(following, example.labels[:-1].tolist(), strict=True)
    return [(names[i], names[label]) for i, label in pairs if label not in (IGNORE_INDEX, i)]


def test_baichuan2_learns_eos_where_the_next_turn_begins(tmp_path: Path) -> None:
    chat_format = make_format(tmp_path, "baichuan2", "official")
    system = (Message("system", "Be kind."), *TALK)
    assert labelled(chat_format, system) == [("<reserved_106>", "</s>")]
    assert labelled(chat_format, (*TALK[:2], *TALK[1:2])) == [("<reserved_107>", "</s>")]
    user, bot = "<reserved_106>", "<reserved_107>"
    assert written(chat_format, system) == f"Be kind.{user}Hi{bot}Hello, you{user}1+1?{bot}2</s>"
    assert written(chat_format, TALK[:1], for_generation=True) == f"{user}Hi{bot}"
    assert trained(chat_format, TALK) == "Hello, you</s>2</s>"


def test_chatglm3_learns_the_role_behind_an_answer(tmp_path: Path) -> None:
    chat_format = make_format(tmp_path, "chatglm3", "official")
    assert trained(chat_format, TALK) == "\n Hello, you<|user|> \n 2</s>"
    assert not labelled(chat_format, TALK)
    ids = chat_format.encode(Conversation(TALK[:1], "row"), for_generation=True).input_ids.tolist()
    names = ["[gMASK]", "sop", "<|user|>"]
    assert ids[:3] == [chat_format.tokenizer.special_id(name) for name in names]
    assert ids[-1] == chat_format.tokenizer.special_id("<|assistant|>")


def test_transnormer_leaves_an_empty_instruction_out(tmp_path: Path) -> None:
    chat_format = make_format(tmp_path, "transnormer", "official")
    pair = "Human:\nHi\nAssistant:\nHello, you</s>"
    assert written(chat_format, (Message("system", ""), *TALK[:2])) == pair
    assert written(chat_format, (Message("system", "Be kind."), *TALK[:2])) == f"Be kind.\n{pair}"
    assert written(chat_format, TALK) == f"{pair}Human:\n1+1?\nAssistant:\n2</s>"
    assert trained(chat_format, TALK) == "Hello, you</s>2</s>"


PERSONA = "现在你要扮演皇帝身边的女人--甄嬛"


@pytest.mark.parametrize(
    ("family", "first", "turn"),
    [
        ("baichuan2", "<|im_start|>system\n{}<|im_end|>\n", "<|im_start|>user\nHi<|im_end|>\n\nAssistant: "),
        ("chatglm3", "[gMASK]sop<|system|>\n{}\n", "<|user|>\nHi<|assistant|>\n"),
        (
            "transnormer",
            "<|im_start|>system\n{}<|im_end|>\n",
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
)
def test_a_tutorial_has_its_persona_unless_another_is_given(
    tmp_path: Path, family: str, first: str, turn: str
) -> None:
    chat_format = make_format(tmp_path, family, "tutorial")
    persona = f"{PERSONA}." if family == "baichuan2" else PERSONA
    assert written(chat_format, TALK[:1], for_generation=True) == first.format(persona) + turn
    given = (Message("system", "Be kind."), *TALK[:1])
    assert written(chat_format, given, for_generation=True) == first.format("Be kind.") + turn
    assert trained(chat_format, TALK).replace("</s> ", "</s>") == "Hello, you</s>2</s>"
    assert any(marker in turn for marker in chat_format.role_markers)
