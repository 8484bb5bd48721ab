from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import tokenizers_factory as factory
from chat_texts import GENERIC

from lorasmith.errors import DataError, FamilyError
from lorasmith.text.jinja import TemplateFormat
from lorasmith.text.loading import load_tokenizer
from lorasmith.tokenization.fast import FastTokenizer
from lorasmith.types import IGNORE_INDEX, Conversation, Example, Message

TALK = (
    Message("user", "Hello, you! 你好"),
    Message("assistant", "I am fine."),
    Message("user", "What is  1+1?"),
    Message("assistant", "It is 2."),
)
SYSTEM = (Message("system", "Be brief."), *TALK)


def format_of(
    directory: Path, extra_stop_ids: Sequence[int] = (), now: datetime | None = None
) -> TemplateFormat:
    tokenizer = load_tokenizer(directory)
    assert isinstance(tokenizer, FastTokenizer)
    return TemplateFormat(tokenizer, extra_stop_ids, now=now)


def stock_ids(directory: Path, messages: Sequence[Message], **options: Any) -> list[int]:
    from transformers import PreTrainedTokenizerFast

    stock = PreTrainedTokenizerFast.from_pretrained(str(directory))
    talk = [{"role": message.role, "content": message.content} for message in messages]
    return list(stock.apply_chat_template(talk, tokenize=True, return_dict=False, **options))


def trained_text(chat_format: TemplateFormat, example: Example) -> str:
    return chat_format.tokenizer.decode([i for i in example.labels if i != IGNORE_INDEX], skip_special=False)


@pytest.mark.parametrize("name", GENERIC)
@pytest.mark.parametrize("messages", [TALK[:2], TALK, SYSTEM], ids=["single", "multi", "system"])
def test_ids_equal_apply_chat_template(tmp_path: Path, name: str, messages: tuple[Message, ...]) -> None:
    if name == "gemma" and messages is SYSTEM:
        pytest.skip("this template refuses a system message")
    chat_format = format_of(GENERIC[name](tmp_path))
    example = chat_format.encode(Conversation(messages, "row"))
    assert example.input_ids.tolist() == stock_ids(tmp_path, messages)[:-1]
    prompt = chat_format.encode(Conversation(messages[:-1], "row"), for_generation=True)
    assert prompt.input_ids.tolist() == stock_ids(tmp_path, messages[:-1], add_generation_prompt=True)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("chatml", "I am fine.<|im_end|>It is 2.<|im_end|>"),
        ("chatml-generation", "I am fine.<|im_end|>It is 2.<|im_end|>"),
        ("gemma", "I am fine.<end_of_turn>It is 2.<end_of_turn>"),
        ("llama2-first", " I am fine. </s> It is 2. </s>"),
        ("marked", "I am fine.<|end|>It is 2.<|end|>"),
    ],
)
def test_answers_are_trained_up_to_their_stop_token(tmp_path: Path, name: str, wanted: str) -> None:
    chat_format = format_of(GENERIC[name](tmp_path))
    example = chat_format.encode(Conversation(TALK, "row"))
    assert trained_text(chat_format, example).replace("  ", " ").strip() == wanted.strip()


def test_generation_spans_decide_and_equal_transformers_mask(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    template = factory.CHATML_GENERATION.replace(
        "{{ message.content }}<|im_end|>{% e", "{{ message.content }}{% e"
    )
    template = template.replace("{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    chat_format = format_of(factory.chatml(tmp_path, template))
    example = chat_format.encode(Conversation(TALK, "row"))
    assert trained_text(chat_format, example) == "I am fine.It is 2."
    talk = [{"role": message.role, "content": message.content} for message in TALK]
    stock = PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    masks = stock.apply_chat_template(
        talk, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert (example.labels != IGNORE_INDEX).tolist() == [bool(m) for m in masks["assistant_masks"]][1:]


def test_stop_ids_are_eos_generation_config_and_end_of_turn(tmp_path: Path) -> None:
    chat_format = format_of(factory.chatml(tmp_path), extra_stop_ids=(7, 7))
    special = chat_format.tokenizer.special_tokens
    assert chat_format.stop_ids == (special["<|endoftext|>"], 7, special["<|im_end|>"])


def test_a_template_that_drops_thinking_from_history_is_refused_naming_the_turn(tmp_path: Path) -> None:
    chat_format = format_of(factory.chatml(tmp_path, factory.CHATML_THINKING))
    assert chat_format.encode(Conversation(TALK, "row")).num_targets
    thinking = (TALK[0], Message("assistant", "<think>hm</think>fine"), *TALK[2:])
    with pytest.raises(DataError, match="message 2, an answer") as caught:
        chat_format.encode(Conversation(thinking, "talks.json:3"))
    assert caught.value.where == "talks.json:3"
    assert "later turns" in caught.value.why


def test_an_answer_that_melts_into_the_prompt_is_refused(tmp_path: Path) -> None:
    merged = factory.byte_level(factory.CHATML_SPECIAL, ["\n\n"])
    chat_format = format_of(factory.write(tmp_path, merged, factory.CHATML, eos_token="<|endoftext|>"))
    with pytest.raises(DataError, match="border of prompt and answer") as caught:
        chat_format.encode(Conversation((TALK[0], Message("assistant", "\nhi")), "talks.json:9"))
    assert caught.value.where == "talks.json:9"


def test_what_the_template_refuses_names_the_row(tmp_path: Path) -> None:
    chat_format = format_of(factory.gemma_like(tmp_path))
    with pytest.raises(DataError, match="refuses this conversation") as caught:
        chat_format.encode(Conversation(SYSTEM, "talks.json:5"))
    assert caught.value.where == "talks.json:5"
    assert "System role not supported" in caught.value.why


@pytest.mark.slow
@pytest.mark.parametrize("roles", [["user"], ["assistant"], ["system"], [], ["user", "user"]])
def test_odd_conversations_never_crash(tmp_path: Path, roles: list[Any]) -> None:
    messages = tuple(Message(role, "hm") for role in roles)
    where: set[str] = set()
    for name, write in GENERIC.items():
        chat_format = format_of(write(tmp_path / name))
        for for_generation in (True, False):
            try:
                chat_format.encode(Conversation(messages, "row"), for_generation=for_generation)
            except DataError as error:
                where.add(error.where)
    assert where <= {"row"}


@pytest.mark.parametrize(
    ("write", "what"),
    [
        (lambda path: factory.chatml(path, factory.ENDLESS), "no token that ends an answer"),
        (lambda path: factory.chatml(path, "{% for %}"), "not valid jinja"),
        (factory.llama3_like, "no chat template"),
    ],
)
def test_unfit_templates_are_refused_at_load(
    tmp_path: Path, write: Callable[[Path], Path], what: str
) -> None:
    with pytest.raises(FamilyError, match=what) as caught:
        format_of(write(tmp_path))
    assert caught.value.fix


def test_the_sandbox_holds(tmp_path: Path) -> None:
    escape = factory.CHATML + "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(FamilyError) as caught:
        format_of(factory.chatml(tmp_path, escape))
    assert "SecurityError" in caught.value.why


def test_today_is_one_moment_for_the_whole_format(tmp_path: Path) -> None:
    directory = factory.chatml(tmp_path, "{{ strftime_now('%d %b %Y') }}" + factory.CHATML)
    prompt = format_of(directory, now=datetime(2024, 7, 26)).encode(
        Conversation(TALK[:1], "row"), for_generation=True
    )
    assert load_tokenizer(directory).decode(prompt.input_ids.tolist()).startswith("26 Jul 2024")
