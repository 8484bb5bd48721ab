from __future__ import annotations

import logging
import warnings

import peft
import pytest
import torch
from byte_chat import SPECIAL_TOKENS, byte_model, endless_model, random_llama, speaking_llama, speaking_model
from transformers import GenerationConfig

from lorasmith.config import GenerateConfig
from lorasmith.errors import DataError
from lorasmith.infer.chat import chat
from lorasmith.infer.generate import encode_prompts, generate
from lorasmith.types import Completion, Conversation, Message

GREEDY = GenerateConfig(greedy=True, max_new_tokens=12)
ASK = [Message("user", "who?")]


def test_the_answer_is_text_without_the_stop_token_which_is_counted() -> None:
    assert chat(speaking_model("I am"), ASK, GREEDY) == Completion("I am", "stop", 6, 5)


def test_max_new_tokens_ends_an_answer_with_length() -> None:
    assert chat(endless_model(), ASK, GREEDY) == Completion("ab" * 6, "length", 6, 12)


@pytest.mark.parametrize("stop", ["<end>", "<eos>", "<user>"])
def test_each_stop_id_of_the_format_ends_the_answer(stop: str) -> None:
    module = speaking_llama([*b"ok", SPECIAL_TOKENS[stop], *b"xyz"])
    answer = chat(byte_model(module, stops=["<end>", "<eos>", "<user>"]), ASK, GREEDY)
    assert (answer.content, answer.finish_reason) == ("ok", "stop")


@pytest.mark.parametrize("eos", [ord("k"), [ord("z"), ord("k")]])
def test_stop_ids_of_generation_config_count_too(eos: int | list[int]) -> None:
    model = speaking_model("ok")
    model.module.generation_config.eos_token_id = eos
    assert chat(model, ASK, GREEDY).content == "o"


def test_results_keep_the_order_of_the_inputs() -> None:
    model = byte_model(random_llama())
    texts = ["one", "a longer one than that", "x", "four", "the fifth is longest of them all"]
    answers = generate(model, [[Message("user", text)] for text in texts], GREEDY, batch_size=2)
    assert [answer.num_prompt_tokens for answer in answers] == [len(text) + 2 for text in texts]


def test_no_conversations_no_answers() -> None:
    assert generate(speaking_model("a"), [], GREEDY) == []


def test_the_models_own_generation_config_has_no_say(caplog: pytest.LogCaptureFixture) -> None:
    model = byte_model(random_llama())
    expected = chat(model, ASK, GREEDY)
    model.module.generation_config = GenerationConfig(
        do_sample=True,
        temperature=9.0,
        top_k=1,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        max_length=3,
        min_length=40,
        min_new_tokens=40,
        forced_eos_token_id=5,
        suppress_tokens=list(range(97, 123)),
        bad_words_ids=[[65]],
        num_beams=3,
        pad_token_id=1,
    )
    logging.getLogger("transformers").addHandler(caplog.handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chat(model, ASK, GREEDY) == expected
        sampled = [chat(model, ASK, GenerateConfig(seed=1, max_new_tokens=8, temperature=2.0)) for _ in "ab"]
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert sampled[0] == sampled[1]
    assert not caplog.records
    assert model.module.generation_config.max_length == 3, "the module itself is left as it was"


def test_a_seed_repeats_and_leaves_the_callers_random_numbers_alone() -> None:
    model = byte_model(random_llama())
    config = GenerateConfig(seed=7, temperature=3.0, top_k=0, top_p=1.0, max_new_tokens=20)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = generate(model, [ASK] * 4, config, batch_size=2)
    assert torch.equal(torch.rand(3), expected)
    assert generate(model, [ASK] * 4, config, batch_size=2) == first
    assert len({answer.content for answer in first}) == 4, "every row and batch draws its own numbers"
    assert generate(model, [ASK] * 4, config.model_copy(update={"seed": 8}), batch_size=2) != first


def test_a_prompt_without_room_is_refused_by_name() -> None:
    model = byte_model(random_llama(max_positions=16))
    assert generate(model, [[Message("user", "x" * 13)]], GREEDY)[0].num_completion_tokens == 1
    with pytest.raises(DataError, match="no room for an answer") as caught:
        generate(model, [Conversation((Message("user", "x" * 14),), "prompts.jsonl:3")], GREEDY)
    assert "prompts.jsonl:3" in str(caught.value)
    assert "16 tokens" in str(caught.value)


def test_the_runs_system_prompt_opens_conversations_that_have_none() -> None:
    model = byte_model(random_llama(), system="Be an emperor")
    own = [Message("system", "Be a cat"), *ASK]
    ids = [bytes(i for i in p.input_ids.tolist() if i < 256) for p in encode_prompts(model, [ASK, own])]
    assert ids == [b"Be an emperorwho?", b"Be a catwho?"]


def test_dropout_is_off_within_and_on_again_after() -> None:
    module = random_llama()
    tuned = peft.get_peft_model(module, peft.LoraConfig(target_modules=["q_proj"], lora_dropout=0.5))
    model = byte_model(module)
    model.module = tuned.train()
    tuned.base_model.model.model.norm.eval()
    modes = [part.training for part in tuned.modules()]
    assert chat(model, ASK, GREEDY) == chat(model, ASK, GREEDY)
    assert [part.training for part in tuned.modules()] == modes
