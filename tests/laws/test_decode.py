"""Law 6: step-by-step decoding is one forward pass, in a batch as alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from byte_chat import RANDOM_MODULES, byte_model
from transformers import PreTrainedModel

from lorasmith.config import GenerateConfig
from lorasmith.infer.decode import decode
from lorasmith.infer.generate import encode_prompts, generate
from lorasmith.types import Message

TEXTS = ["hi", "a much longer question than the others, with many words", "你是谁？", "x"]
CONVERSATIONS = [[Message("user", text)] for text in TEXTS]


@pytest.fixture(params=RANDOM_MODULES)
def make(request: pytest.FixtureRequest) -> Callable[..., PreTrainedModel]:
    return RANDOM_MODULES[request.param]


@pytest.mark.parametrize("seed", range(3))
def test_each_greedy_id_is_the_argmax_of_one_forward_pass(
    make: Callable[..., PreTrainedModel], seed: int
) -> None:
    model = byte_model(make(seed=seed))
    for prompt in encode_prompts(model, CONVERSATIONS):
        [answer] = decode(model, [prompt.input_ids], GenerateConfig(greedy=True, max_new_tokens=24))
        row = np.concatenate([prompt.input_ids, answer.ids])
        with torch.no_grad():
            logits_TV = model.module(torch.from_numpy(row)[None]).logits[0]
        assert logits_TV.argmax(-1)[len(prompt) - 1 : -1].tolist() == answer.ids


@pytest.mark.parametrize(
    "knobs", [{}, {"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}], ids=["plain", "penalty", "ngram"]
)
@pytest.mark.parametrize("stops", [["<end>"], ["<eos>"]], ids=["end", "pad-is-stop"])
def test_a_batch_answers_as_each_prompt_alone(
    make: Callable[..., PreTrainedModel], knobs: dict[str, float], stops: list[str]
) -> None:
    model = byte_model(make(), stops=stops)
    config = GenerateConfig(greedy=True, max_new_tokens=40, **knobs)
    together = generate(model, CONVERSATIONS, config, batch_size=4)
    assert together == [generate(model, [one], config)[0] for one in CONVERSATIONS]


def test_a_batch_fills_the_context_of_each_row_as_alone(make: Callable[..., PreTrainedModel]) -> None:
    model = byte_model(make(max_positions=64))
    config = GenerateConfig(greedy=True, max_new_tokens=500)
    together = generate(model, CONVERSATIONS, config, batch_size=4)
    assert together == [generate(model, [one], config)[0] for one in CONVERSATIONS]
    for one in together:
        assert one.finish_reason == "stop" or one.num_prompt_tokens + one.num_completion_tokens == 64
