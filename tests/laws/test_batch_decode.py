"""Law 6, for batches: neither a shared start, nor groups, nor rows that leave change an answer."""

from __future__ import annotations

import numpy as np
import peft
import pytest
import torch
from byte_chat import VOCAB_SIZE, byte_model
from modules import KINDS, tiny_module, two_targets

from lorasmith.config import GenerateConfig
from lorasmith.infer.decode import decode
from lorasmith.infer.generate import generate
from lorasmith.model.model import Model
from lorasmith.types import Ints, Message

GREEDY = GenerateConfig(greedy=True, max_new_tokens=24)
SAMPLED = GenerateConfig(seed=3, temperature=2.0, max_new_tokens=24)
TEXTS = ["hi", "a much longer question than the others, with many words", "你是谁？", "x", "hi there", "x"]


def speaking(kind: str) -> Model:
    """Every tenth id ends an answer, so that rows end at different times."""
    # transformers' eager mask overflows to -inf in float64, and padding becomes NaN
    dtype = torch.float32 if kind == "gemma2" else torch.float64
    model = byte_model(tiny_module(kind, dtype, vocab_size=VOCAB_SIZE, seed=1))
    model.module.generation_config.eos_token_id = list(range(0, VOCAB_SIZE, 10))
    return model


def prompts(prefix: int, *, count: int = 7) -> list[Ints]:
    """Random prompts of 1 to 30 tokens behind `prefix` that they share."""
    generator = np.random.default_rng(prefix)
    start = generator.integers(0, 256, prefix)
    lengths = generator.integers(1, 31, count)
    return [np.concatenate([start, generator.integers(0, 256, length)]) for length in lengths]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", [0, 5, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 40))])
@pytest.mark.parametrize("config", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_batch_is_its_rows_alone_however_it_is_read(kind: str, prefix: int, config: GenerateConfig) -> None:
    model, batch = speaking(kind), prompts(prefix)
    alone = [decode(model, [prompt], config)[0] for prompt in batch]
    for pass_cost in (0, 8, 10**9):
        for compact_at in (0.0, 1.0):
            assert decode(model, batch, config, pass_cost=pass_cost, compact_at=compact_at) == alone


@pytest.mark.parametrize("kind", KINDS)
def test_a_sampled_answer_is_the_same_in_any_batch_and_order(kind: str) -> None:
    model = speaking(kind)
    model.system = "You are an emperor"
    conversations = [[Message("user", text)] for text in TEXTS]
    alone = [generate(model, [one], SAMPLED)[0] for one in conversations]
    for batch_size in (1, 4, 6):
        together = generate(model, conversations, SAMPLED, batch_size=batch_size)
        assert together[:5] == alone[:5]
        assert together[5] != alone[5], "the same question again is drawn anew"
    assert generate(model, conversations[4::-1], SAMPLED, batch_size=3) == alone[4::-1]


@pytest.mark.parametrize("kind", KINDS)
def test_generation_leaves_every_weight_of_a_tuned_model_as_it_was(kind: str) -> None:
    model = speaking(kind)
    lora = peft.LoraConfig(r=2, target_modules=two_targets(kind), init_lora_weights=False)
    tuned = peft.get_peft_model(model.module, lora)
    model.module = tuned
    before = {name: weight.clone() for name, weight in tuned.state_dict().items()}
    batch = prompts(12)
    together = decode(model, batch, SAMPLED, pass_cost=0)
    assert together == [decode(model, [prompt], SAMPLED)[0] for prompt in batch]
    with tuned.disable_adapter():
        assert decode(model, batch, SAMPLED) != together
    assert all(torch.equal(weight, before[name]) for name, weight in tuned.state_dict().items())
