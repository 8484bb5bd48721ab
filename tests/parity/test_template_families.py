"""Families beside a chat template: ids of stock apply_chat_template, labels of the authors' rule."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers_factory as factory
from transformers import PreTrainedTokenizerFast

from lorasmith.errors import DataError, FamilyError
from lorasmith.families import find_family
from lorasmith.text.loading import load_tokenizer
from lorasmith.text.template import ChatFormat
from lorasmith.types import IGNORE_INDEX, Conversation, Example, Message

TALK = (
    Message("user", "Hello, you! 你好"),
    Message("assistant", "I am fine."),
    Message("user", "What is  1+1?"),
    Message("assistant", "It is 2."),
)
SYSTEM = (Message("system", "Be brief."), *TALK)
TALKS = pytest.mark.parametrize("messages", [TALK[:2], TALK, SYSTEM], ids=["single", "multi", "system"])


class Stock:
    """The same directory, as transformers reads it."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(str(directory))

    def ids(self, messages: Sequence[Message], **options: Any) -> list[int]:
        talk = [{"role": message.role, "content": message.content} for message in messages]
        return list(self.tokenizer.apply_chat_template(talk, tokenize=True, return_dict=False, **options))

    def id_of(self, token: str) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(token))


def format_of(directory: Path, family: str) -> ChatFormat:
    return find_family({}, family).chat_format("official", load_tokenizer(directory))


def encoded(chat_format: ChatFormat, messages: Sequence[Message]) -> Example:
    return chat_format.encode(Conversation(tuple(messages), "row"))


def prompt_of(chat_format: ChatFormat, messages: Sequence[Message]) -> list[int]:
    asked = Conversation(tuple(messages), "row")
    return [int(i) for i in chat_format.encode(asked, for_generation=True).input_ids]


def trained_text(chat_format: ChatFormat, example: Example) -> str:
    ids = [int(i) for i in example.labels if i != IGNORE_INDEX]
    return chat_format.tokenizer.decode(ids, skip_special=False)


def labels_of_glm4(stock: Stock, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Each message by itself behind [gMASK]<sop>; the mask of an answer lies one token further on."""
    start = [stock.id_of("[gMASK]"), stock.id_of("<sop>")]
    ids, mask = list(start), [False] * len(start)
    for message in messages:
        own = stock.ids([message])[len(start) :]
        ids += own
        mask += [message.role == "assistant"] * len(own)
    ids.append(stock.id_of("<|user|>"))
    mask = [False, *mask]
    return ids, [i if trained else IGNORE_INDEX for i, trained in zip(ids, mask, strict=True)]


@TALKS
def test_glm4_trains_what_its_authors_train(tmp_path: Path, messages: tuple[Message, ...]) -> None:
    stock = Stock(factory.glm4_like(tmp_path, line_break=""))
    example = encoded(format_of(tmp_path, "glm4"), messages)
    ids, labels = labels_of_glm4(stock, messages)
    assert example.input_ids.tolist() == ids[:-1]
    assert example.labels.tolist() == labels[1:]


@TALKS
@pytest.mark.parametrize("line_break", ["", "\n"])
def test_glm4_writes_what_its_template_writes(
    tmp_path: Path, messages: tuple[Message, ...], line_break: str
) -> None:
    stock = Stock(factory.glm4_like(tmp_path, line_break))
    chat_format = format_of(tmp_path, "glm4")
    assert encoded(chat_format, messages).input_ids.tolist() == stock.ids(messages)
    assert prompt_of(chat_format, messages[:-1]) == stock.ids(messages[:-1], add_generation_prompt=True)
    assert trained_text(chat_format, encoded(chat_format, TALK)).replace("\n", "") == (
        "I am fine.<|user|>It is 2.<|user|>"
    )


def test_glm4_stops_where_another_role_begins(tmp_path: Path) -> None:
    stock = Stock(factory.glm4_like(tmp_path))
    stops = {stock.id_of(token) for token in ("<|user|>", "<|observation|>", "<|endoftext|>")}
    assert set(format_of(tmp_path, "glm4").stop_ids) == stops
    with pytest.raises(FamilyError, match="no token that ends an answer"):
        format_of(tmp_path, "generic")


@pytest.mark.parametrize("words", [(), ("<think>", "</think>")], ids=["text", "tokens"])
def test_qwen3_writes_what_its_template_writes_with_thinking_off(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    stock = Stock(factory.qwen3_like(tmp_path, words=words))
    chat_format = format_of(tmp_path, "qwen3")
    for messages in (TALK[:2], SYSTEM[:3]):
        assert encoded(chat_format, messages).input_ids.tolist() == stock.ids(messages)[:-1]
        prompt = stock.ids(messages[:-1], add_generation_prompt=True, enable_thinking=False)
        assert prompt_of(chat_format, messages[:-1]) == prompt
    assert trained_text(chat_format, encoded(chat_format, TALK)) == "I am fine.<|im_end|>It is 2.<|im_end|>"


def test_qwen3_keeps_the_block_that_its_template_drops_from_earlier_answers(tmp_path: Path) -> None:
    stock = Stock(factory.qwen3_like(tmp_path))
    ours = stock.tokenizer.decode(encoded(format_of(tmp_path, "qwen3"), TALK).input_ids)
    theirs = stock.tokenizer.decode(stock.ids(TALK)[:-1])
    assert (ours.count("<think>"), theirs.count("<think>")) == (2, 1)
    assert ours.replace("<think>\n\n</think>\n\n", "") == theirs.replace("<think>\n\n</think>\n\n", "")
    with pytest.raises(DataError, match="cannot be trained"):
        encoded(format_of(tmp_path, "generic"), TALK)


def test_qwen3_sends_answers_with_thinking_to_the_template(tmp_path: Path) -> None:
    factory.qwen3_like(tmp_path)
    thinking = (TALK[0], Message("assistant", "<think>\nHm.\n</think>\n\nI am fine."))
    with pytest.raises(DataError, match="brings its own thinking") as caught:
        encoded(format_of(tmp_path, "qwen3"), thinking)
    assert "--family generic" in caught.value.fix
    asked = (*thinking, TALK[2])
    assert prompt_of(format_of(tmp_path, "qwen3"), asked) == prompt_of(format_of(tmp_path, "qwen3"), TALK[:3])
    generic = format_of(tmp_path, "generic")
    assert trained_text(generic, encoded(generic, thinking)) == f"{thinking[1].content}<|im_end|>"


@TALKS
def test_qwen3_without_a_switch_is_its_template(tmp_path: Path, messages: tuple[Message, ...]) -> None:
    stock = Stock(factory.qwen3_like(tmp_path, factory.CHATML))
    example = encoded(format_of(tmp_path, "qwen3"), messages)
    assert example.input_ids.tolist() == stock.ids(messages)[:-1]
