"""Law 6: step-by-step decoding is one forward pass, in a batch as alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from byte_chat import VOCAB_SIZE, byte_model
from modules import KINDS, tiny_module

from lorasmith.config import GenerateConfig
from lorasmith.infer.decode import decode
from lorasmith.infer.generate import encode_prompts, generate
from lorasmith.model.model import Model
from lorasmith.types import Message

TEXTS = ["hi", "a much longer question than the others, with many words", "你是谁？", "x"]
CONVERSATIONS = [[Message("user", text)] for text in TEXTS]


def speaking(
    kind: str, *, stops: Sequence[str] = ("<end>",), max_positions: int = 256, seed: int = 0
) -> Model:
    sizes = {"vocab_size": VOCAB_SIZE, "max_positions": max_positions, "seed": seed}
    return byte_model(tiny_module(kind, torch.float32, **sizes), stops=stops)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_each_greedy_id_is_the_argmax_of_one_forward_pass(kind: str, seed: int) -> None:
    model = speaking(kind, seed=seed)
    for prompt in encode_prompts(model, CONVERSATIONS):
        [answer] = decode(model, [prompt.input_ids], GenerateConfig(greedy=True, max_new_tokens=24))
        row = np.concatenate([prompt.input_ids, answer.ids])
        with torch.no_grad():
            logits_TV = model.module(torch.from_numpy(row)[None]).logits[0]
        assert logits_TV.argmax(-1)[len(prompt) - 1 : -1].tolist() == answer.ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "knobs", [{}, {"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}], ids=["plain", "penalty", "ngram"]
)
@pytest.mark.parametrize("stops", [["<end>"], ["<eos>"]], ids=["end", "pad-is-stop"])
def test_a_batch_answers_as_each_prompt_alone(kind: str, knobs: dict[str, float], stops: list[str]) -> None:
    model = speaking(kind, stops=stops)
    config = GenerateConfig(greedy=True, max_new_tokens=40, **knobs)
    together = generate(model, CONVERSATIONS, config, batch_size=4)
    assert together == [generate(model, [one], config)[0] for one in CONVERSATIONS]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_fills_the_context_of_each_row_as_alone(kind: str) -> None:
    model = speaking(kind, max_positions=64)
    config = GenerateConfig(greedy=True, max_new_tokens=500)
    together = generate(model, CONVERSATIONS, config, batch_size=4)
    assert together == [generate(model, [one], config)[0] for one in CONVERSATIONS]
    for one in together:
        assert one.finish_reason == "stop" or one.num_prompt_tokens + one.num_completion_tokens == 64
