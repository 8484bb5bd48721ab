"""What each lever of training gives: seconds of a step with it switched off over seconds with all of them.

A random Llama and random conversations as long as those of persona data (64 tokens, of which 13 are a shared
head and 24 are supervised), 16 to a step. It takes some minutes and writes levers.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import date
from functools import lru_cache, partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from lorasmith.adapters.dropout import DropoutClock
from lorasmith.adapters.lora import attach_lora
from lorasmith.attention.layout import LayoutIndex, visible
from lorasmith.batching.loader import Loader
from lorasmith.config import LoraConfig
from lorasmith.model.packed import PackedModule, packed
from lorasmith.training.step import accumulate_gradients
from lorasmith.types import IGNORE_INDEX, Example, Layout

Off = Callable[[], AbstractContextManager[object]]
CONVERSATIONS, BATCH_SIZE = 64, 16


def conversations() -> list[Example]:
    draw = np.random.default_rng(0)
    head = draw.integers(0, 32_000, 13)
    rows = []
    for _ in range(CONVERSATIONS):
        question, answer = 6 + int(draw.gamma(2, 10)), 4 + int(draw.gamma(2, 10))
        ids = np.concatenate([head, draw.integers(0, 32_000, question + answer)])
        labels = np.where(np.arange(len(ids)) >= len(head) + question - 1, ids, IGNORE_INDEX)
        rows.append(Example(ids, labels))
    return rows


def tuned(layers: int, dropout: float) -> tuple[torch.nn.Module, DropoutClock]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=12,
    )
    clock = DropoutClock(seed=0)
    lora = LoraConfig(r=8, lora_alpha=32, lora_dropout=dropout, target_modules="all-linear")
    module = LlamaForCausalLM(config)
    return attach_lora(module, lora, family_targets=None, base_name="random", clock=clock).train(), clock


@lru_cache(maxsize=8)
def mask_of(layout: Layout) -> torch.Tensor:
    return visible(layout)


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, index: LayoutIndex, scale: float
) -> torch.Tensor:
    mask = mask_of(index.layout)
    return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=scale)[0]


@contextmanager
def whole_logits() -> Iterator[None]:
    with patch("lorasmith.model.packed._plain_head", lambda base: None):
        yield


LEVERS: dict[str, Off] = {
    "all levers on": nullcontext,
    "tiles of segments (a dense mask instead)": partial(
        patch, "lorasmith.attention.layout.layout_attention", dense_attention
    ),
    "fused LoRA linear (peft's own instead)": partial(
        patch, "lorasmith.adapters.lora_linear.LoraLinear._is_plain", lambda self, x: False
    ),
    "oneDNN's matrix products where MKL is slow": partial(
        patch, "lorasmith.ops.gemm._mkl_is_slow", lambda: False
    ),
    "fused norm, SwiGLU and rotary": partial(patch, "lorasmith.model.packed.fused_ops", nullcontext),
    "fused loss in tiles (all logits instead)": whole_logits,
    "last layer on labelled positions only": partial(
        patch, "lorasmith.model.packed._last_position_wise", lambda base: []
    ),
}
ROWS: dict[str, dict[str, object]] = {
    "shared prefixes": {"share_prefixes": False},
    "packing (a row for each conversation instead)": {"packed": False, "share_prefixes": False},
    "one row a step (rows of 256 tokens instead)": {"max_tokens": 256},
}


def seconds(rows: PackedModule, loader: Loader) -> float:
    """Of all steps of an epoch, forward and backward."""
    started = time.perf_counter()
    for step in range(loader.steps_per_epoch):
        rows.clock.step = step
        batches = loader.step(step)
        accumulate_gradients(rows, batches, sum(batch.num_targets for batch in batches))
        rows.module.zero_grad(set_to_none=True)
    return time.perf_counter() - started


def measure(layers: int, rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    examples = conversations()
    whole = {"batch_size": BATCH_SIZE, "max_tokens": 4096, "seed": 0, "shuffle": True}
    module, clock = tuned(layers, dropout=0.1)
    without, clock_without = tuned(layers, dropout=0.0)
    for turn in range(rounds + 1):
        took = {}
        for name, off in LEVERS.items():
            with off(), packed(module, clock) as rows:
                took[name] = seconds(rows, Loader(examples, **whole))
        for name, changed in ROWS.items():
            with packed(module, clock) as rows:
                took[name] = seconds(rows, Loader(examples, **{**whole, **changed}))
        with packed(without, clock_without) as rows:
            took["dropout is 0 (what dropout costs)"] = seconds(rows, Loader(examples, **whole))
        for name, value in took.items() if turn else ():  # the first round warms up
            found.setdefault(name, []).append(value)
    return found


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--layers", type=int, default=8)
    asked.add_argument("--rounds", type=int, default=3)
    asked.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = asked.parse_args()
    found = {name: statistics.median(took) for name, took in measure(args.layers, args.rounds).items()}
    whole = found["all levers on"]
    for name, took in sorted(found.items(), key=lambda item: -item[1]):
        print(f"{took / whole:5.2f} x  {took:6.2f} s  {name}")
    machine = {
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "torch": torch.__version__,
    }
    told = {"date": str(date.today()), "machine": machine, "layers": args.layers, "seconds": found}
    args.out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
