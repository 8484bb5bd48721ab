from __future__ import annotations

import threading
import time

import peft
import pytest
import torch
from byte_chat import byte_model, endless_model, random_llama, speaking_model

from lorasmith.config import GenerateConfig
from lorasmith.errors import ConfigError, DataError
from lorasmith.infer.chat import ChatSession, chat, compare, without_adapter
from lorasmith.model.model import Model
from lorasmith.types import Completion, Message

GREEDY = GenerateConfig(greedy=True, max_new_tokens=30)
MULTI_BYTE = "é中😀"


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("generate")}


def test_a_stream_yields_whole_characters_only() -> None:
    session = ChatSession(speaking_model(MULTI_BYTE), GREEDY)
    assert list(session.stream("hi")) == list(MULTI_BYTE)
    assert session.last == Completion(MULTI_BYTE, "stop", 4, 10)
    assert session.history == [Message("user", "hi"), Message("assistant", MULTI_BYTE)]
    assert not threads()


def test_an_answer_cut_within_a_character_says_so_at_its_end() -> None:
    session = ChatSession(speaking_model(MULTI_BYTE), GenerateConfig(greedy=True, max_new_tokens=3))
    assert "".join(session.stream("hi")) == session.last.content == "é\N{REPLACEMENT CHARACTER}"
    assert session.last.finish_reason == "length"


def test_white_space_around_the_answer_is_not_shown() -> None:
    session = ChatSession(speaking_model(" a\tb\n"), GREEDY)
    pieces = list(session.stream("hi"))
    assert pieces == ["a", "\tb"]
    assert session.last.content == "a\tb"


@pytest.mark.parametrize("seed", range(4))
def test_a_stream_joined_is_the_answer_of_generate(seed: int) -> None:
    model = byte_model(random_llama(seed=seed))
    session = ChatSession(model, GREEDY)
    assert "".join(session.stream("hi")) == chat(model, [Message("user", "hi")], GREEDY).content
    config = GenerateConfig(seed=seed, max_new_tokens=30)
    sampling = ChatSession(model, config)
    assert "".join(sampling.stream("hi")) == chat(model, [Message("user", "hi")], config).content


def test_later_turns_see_earlier_ones_until_reset() -> None:
    session = ChatSession(speaking_model("ok"), GREEDY, system="S")
    list(session.stream("hi"))
    list(session.stream("hi"))
    first, second = len("|S|hi|"), len("ok||hi|")
    assert session.last.num_prompt_tokens == first + second
    session.reset()
    assert (session.history, session.last) == ([], None)
    list(session.stream("hi"))
    assert session.last.num_prompt_tokens == first


def test_the_system_prompt_of_the_run_can_be_replaced_and_left_out() -> None:
    model = speaking_model("ok", system="You are 甄嬛")
    assert ChatSession(model, GREEDY).system == "You are 甄嬛"
    bare = ChatSession(model, GREEDY, system="")
    list(bare.stream("hi"))
    assert bare.last.num_prompt_tokens == 4


def test_closing_stops_the_generation_and_keeps_what_was_shown() -> None:
    session = ChatSession(endless_model(), GenerateConfig(greedy=True, max_new_tokens=50_000))
    stream = session.stream("hi")
    shown = [next(stream) for _ in range(3)]
    start = time.perf_counter()
    stream.close()
    assert time.perf_counter() - start < 5
    assert not threads()
    assert session.history[-1] == Message("assistant", "".join(shown))
    assert session.last == Completion("aba", "length", 4, 3)


def test_ctrl_c_while_waiting_stops_the_generation_too() -> None:
    session = ChatSession(endless_model(), GenerateConfig(greedy=True, max_new_tokens=50_000))
    stream = session.stream("hi")
    next(stream)
    with pytest.raises(KeyboardInterrupt):
        stream.throw(KeyboardInterrupt())  # type: ignore[attr-defined]
    assert not threads()
    assert session.history[-1] == Message("assistant", "a")


def test_an_error_of_the_thread_reaches_the_caller_and_leaves_the_history() -> None:
    session = ChatSession(byte_model(random_llama(vocab_size=200)), GREEDY)
    with pytest.raises(IndexError):
        list(session.stream("hi"))
    assert (session.history, session.last) == ([], None)
    assert not threads()


def test_a_conversation_that_outgrew_the_context_is_refused() -> None:
    session = ChatSession(byte_model(random_llama(max_positions=24)), GREEDY)
    list(session.stream("x" * 10))
    turns = list(session.history)
    with pytest.raises(DataError, match="no room"):
        list(session.stream("x" * 20))
    assert session.history == turns


def tuned_model() -> Model:
    model = byte_model(random_llama())
    torch.manual_seed(0)
    tuned = peft.get_peft_model(
        model.module,
        peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_alpha=64),
    )
    model.module = tuned.eval()
    return model


def test_compare_answers_with_and_without_the_adapter() -> None:
    ask = [Message("user", "hi")]
    plain = chat(byte_model(random_llama()), ask, GREEDY)
    model = tuned_model()
    base, tuned = compare(model, ask, GREEDY)
    assert base == plain
    assert tuned == chat(model, ask, GREEDY)
    assert tuned != base


def test_without_adapter_needs_one() -> None:
    with pytest.raises(ConfigError, match="no adapter"), without_adapter(speaking_model("a")):
        pass
