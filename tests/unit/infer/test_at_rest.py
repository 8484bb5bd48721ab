"""Adapted layers rest while a model decodes: nobody asks at each token whether they are plain."""

from __future__ import annotations

import threading

import numpy as np
import peft
import pytest
import torch
from byte_chat import byte_model, random_llama
from torch import nn

from lorasmith.adapters.lora_linear import LoraLinear, use_fast_linear
from lorasmith.config import GenerateConfig
from lorasmith.infer.decode import Decoded, decode
from lorasmith.model.fused import replaced_forward
from lorasmith.model.model import Model

PROMPT = np.array([7, 8, 9])
TOKENS = 6


def adapted_model() -> Model:
    module = random_llama()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    use_fast_linear(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        peft.get_peft_model(module, config)
    return byte_model(module.eval(), stops=[])


def layers(model: Model) -> list[LoraLinear]:
    return [part for part in model.module.modules() if isinstance(part, LoraLinear)]


def any_rests(model: Model) -> bool:
    return any("forward" in vars(layer) for layer in layers(model))


def greedy(model: Model, **how: object) -> list[Decoded]:
    return decode(model, [PROMPT], GenerateConfig(greedy=True, max_new_tokens=TOKENS), **how)  # type: ignore[arg-type]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that a layer looks whether it is plain; it looks for real."""
    seen, real = [], LoraLinear._is_plain
    monkeypatch.setattr(LoraLinear, "_is_plain", lambda *args: seen.append(1) or real(*args))
    return seen


def test_each_layer_is_asked_once_for_many_tokens(asked: list[int]) -> None:
    model = adapted_model()
    [answer] = greedy(model)
    assert answer.num_tokens == TOKENS
    assert len(asked) == len(layers(model)) == 4
    assert not any_rests(model)


def test_no_layer_rests_after_an_error_at_a_token() -> None:
    model = adapted_model()

    def fail(_: int) -> None:
        assert any_rests(model)
        raise InterruptedError("at a token")

    with pytest.raises(InterruptedError, match="at a token"):
        greedy(model, on_token=fail)
    assert not any_rests(model)


def test_two_threads_decode_one_model_and_the_first_leaves_first() -> None:
    model, answers = adapted_model(), dict[str, list[Decoded]]()
    expected = greedy(model)
    first_within, second_within, first_left = threading.Event(), threading.Event(), threading.Event()

    def first(_: int) -> None:
        first_within.set()
        assert second_within.wait(30)

    def second(_: int) -> None:
        second_within.set()
        assert first_left.wait(30)

    def run_first() -> None:
        answers["first"] = greedy(model, on_token=first)
        first_left.set()

    def run_second() -> None:
        assert first_within.wait(30)
        answers["second"] = greedy(model, on_token=second)

    threads = [threading.Thread(target=run) for run in (run_first, run_second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {"first": expected, "second": expected}
    assert not any_rests(model)


def test_a_forward_that_somebody_else_put_there_or_took_away_stays_so() -> None:
    layer = nn.Linear(2, 2)

    def other(x: torch.Tensor) -> torch.Tensor:
        return x

    with replaced_forward(layer, lambda x: x):
        vars(layer)["forward"] = other
    assert vars(layer)["forward"] is other
    with replaced_forward(layer, lambda x: x):
        del vars(layer)["forward"]
    assert "forward" not in vars(layer)
