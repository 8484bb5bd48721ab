"""The estimate of a step's memory against what a step takes, and how many layers it makes recompute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from modules import VOCAB, tiny_module
from torch.profiler import ProfilerActivity, profile
from transformers import CONFIG_MAPPING

import lorasmith as ls
from lorasmith.adapters.dropout import DropoutClock
from lorasmith.adapters.lora import attach_lora, trainable_parameters
from lorasmith.batching.loader import training_loader
from lorasmith.config import TrainConfig
from lorasmith.memory.estimate import (
    activation_widths,
    adapted_on_meta,
    fewest_layers,
    layers_asked,
    needed_memory,
)
from lorasmith.model.checkpointing import activation_checkpointing
from lorasmith.model.packed import packed
from lorasmith.testing.texts import random_examples
from lorasmith.training.step import step_gradients

SIZES = {
    "small": {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 6},
    "large": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 10},
}


@contextmanager
def peak_bytes() -> Iterator[list[int]]:
    """The most that torch's CPU allocator had given out at once, above what it had at the start."""
    peak: list[int] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as done:
        yield peak
    held = most = 0
    for event in done.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    peak.append(most)


def measured(kind: str, targets: Any, recomputed: int, **size: int) -> tuple[int, int]:
    """Bytes of a step's gradients and activations: by the estimate, and as they were."""
    clock = DropoutClock(seed=0)
    module = tiny_module(kind, torch.float32, max_positions=512, **size)
    config = ls.LoraConfig(r=4, target_modules=targets)
    model = attach_lora(module, config, family_targets=None, base_name="b", clock=clock).train()
    loader = training_loader(
        random_examples(VOCAB, 16, seed=0, prefix=3, longest=120), TrainConfig(batch_size=16), packed=True
    )
    rows = loader.step(0)
    estimate = needed_memory(model, rows, torch.float32, torch.device("cpu"))(recomputed)
    parameters = list(trainable_parameters(model).values())
    with packed(model, clock) as packed_rows, activation_checkpointing(model) as layers:
        layers.use(recomputed)
        with peak_bytes() as peak:
            step_gradients(packed_rows, parameters, rows, max_grad_norm=None)
    return estimate.activations + estimate.adapter // 4, peak[0]


@pytest.mark.parametrize("recomputed", [0, 4])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("llama3", "all-linear"),
        ("llama3", ["q_proj", "v_proj"]),
        ("baichuan2", "all-linear"),
        ("chatglm3", ["query_key_value"]),
    ],
)
def test_the_estimate_is_within_thirty_percent(kind: str, targets: Any, size: str, recomputed: int) -> None:
    told, took = measured(kind, targets, recomputed, **SIZES[size])
    assert 0.7 < told / took < 1.3, (told, took)


GENERIC = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
}
OUTPUTS = 4 * 64 + 2 * 192 + 64


@pytest.mark.parametrize(
    ("kind", "remade"),
    [
        ("llama", True),
        ("gemma", False),  # 1 + weight, gelu
        ("gemma2", False),  # the same, soft caps
        ("mistral", False),  # sliding windows
    ],
)
def test_only_our_own_ops_make_again_what_they_read(kind: str, remade: bool) -> None:
    """By the meta device, which is all that a plan has."""
    config = ls.LoraConfig(r=2, target_modules="all-linear")
    model = adapted_on_meta(CONFIG_MAPPING[kind](**GENERIC), config, None)
    normed_and_products = 2 * 64 + 64 + 192  # read by q, k, v; by gate, up; by o; by down
    kept = 64 if remade else normed_and_products
    assert activation_widths(model).layers == (OUTPUTS + kept,) * 2


def test_as_few_layers_recompute_as_are_needed() -> None:
    def needed(layers: int) -> int:
        return 100 - 5 * layers

    assert fewest_layers(10, None, needed) == 0
    assert fewest_layers(10, 125, needed) == 0, "with a quarter to spare"
    assert fewest_layers(10, 124, needed) == 1
    assert fewest_layers(10, 100, needed) == 4
    assert fewest_layers(10, 1, needed) == 10


def test_what_is_asked_holds_and_auto_is_chosen() -> None:
    module = tiny_module("llama3", torch.float32)
    config = ls.LoraConfig(r=4, target_modules="all-linear")
    model = attach_lora(module, config, family_targets=None, base_name="b", clock=DropoutClock(seed=0))
    assert [layers_asked(model, asked, 1, lambda n: 10) for asked in (True, False, "auto")] == [3, 0, 3]
    assert layers_asked(model, "auto", 1 << 40, lambda n: 10) == 0


def test_more_layers_recompute_and_less_is_kept() -> None:
    clock = DropoutClock(seed=0)
    model = attach_lora(
        tiny_module("llama3", torch.float32),
        ls.LoraConfig(r=4),
        family_targets=["q_proj"],
        base_name="b",
        clock=clock,
    )
    loader = training_loader(random_examples(VOCAB, 8, seed=0), TrainConfig(batch_size=8), packed=True)
    needed = needed_memory(model, loader.step(0), torch.float32, torch.device("cpu"))
    totals = [needed(n).activations for n in range(4)]
    assert totals[0] > totals[1] > totals[2]


def test_a_base_in_fp8_takes_half_of_its_linear_layers() -> None:
    model = attach_lora(
        tiny_module("llama3", torch.bfloat16),
        ls.LoraConfig(r=4),
        family_targets=None,
        base_name="b",
        clock=DropoutClock(seed=0),
    )
    loader = training_loader(random_examples(VOCAB, 4), TrainConfig(), packed=True)
    own, rounded = (
        needed_memory(model, loader.step(0), torch.bfloat16, torch.device("cpu"), fp8_base=fp8)(0)
        for fp8 in (False, True)
    )
    linears = sum(p.numel() for name, p in model.named_parameters() if "proj.base_layer" in name)
    assert own.weights - rounded.weights == linears
    assert (own.adapter, own.activations) == (rounded.adapter, rounded.activations)
