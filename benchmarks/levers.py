"""What each lever of training gives: a step with it switched off beside one with all of them on.

A random Llama and random conversations as long as those of persona data (64 tokens, of which 13 are a shared
head and 24 are supervised), 16 to a step. Each lever's step comes in the same half minute as one with all on,
and is told as times that; medians. Memory is the peak of one step beyond weights and adapter, as torch's
allocator counts it. About four minutes on 4 quiet cores. Prints the table of docs/performance.md and writes
levers.json, which holds it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import date
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import tables
import torch
import torch.nn.functional as F
from ops import machine
from torch.profiler import ProfilerActivity, profile
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
CONVERSATIONS, BATCH_SIZE, VOCABULARY = 32, 16, 32_000


def conversations() -> list[Example]:
    draw = np.random.default_rng(0)
    head = draw.integers(0, VOCABULARY, 13)
    rows = []
    for _ in range(CONVERSATIONS):
        question, answer = 6 + int(draw.gamma(2, 10)), 4 + int(draw.gamma(2, 10))
        ids = np.concatenate([head, draw.integers(0, VOCABULARY, question + answer)])
        labels = np.where(np.arange(len(ids)) >= len(head) + question - 1, ids, IGNORE_INDEX)
        rows.append(Example(ids, labels))
    return rows


def tuned(hidden: int, layers: int, dropout: float) -> tuple[torch.nn.Module, DropoutClock]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
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
    tables.ALL_ON: nullcontext,
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


class Contest(NamedTuple):
    """One way to train: a model, what is switched off in it, and its rows."""

    model: tuple[torch.nn.Module, DropoutClock]
    off: Off
    loader: Loader


def contests(hidden: int, layers: int) -> dict[str, Contest]:
    rows, with_dropout = conversations(), tuned(hidden, layers, dropout=0.1)

    def loader(**changed: Any) -> Loader:
        whole = {"batch_size": BATCH_SIZE, "max_tokens": 4096, "seed": 0, "shuffle": True}
        return Loader(rows, **{**whole, **changed})

    found = {name: Contest(with_dropout, off, loader()) for name, off in LEVERS.items()}
    found |= {name: Contest(with_dropout, nullcontext, loader(**changed)) for name, changed in ROWS.items()}
    without = Contest(tuned(hidden, layers, dropout=0.0), nullcontext, loader())
    return {**found, "dropout is 0 (what dropout costs)": without}


def take_step(rows: PackedModule, loader: Loader, step: int) -> None:
    """Forward and backward; the gradients are dropped."""
    rows.clock.step = step
    batches = loader.step(step)
    accumulate_gradients(rows, batches, sum(batch.num_targets for batch in batches))
    rows.module.zero_grad(set_to_none=True)


def seconds_of(contest: Contest, step: int) -> float:
    """Of one step, after the same one has warmed up."""
    with contest.off(), packed(*contest.model) as rows:
        take_step(rows, contest.loader, step)
        started = time.perf_counter()
        take_step(rows, contest.loader, step)
        return time.perf_counter() - started


def peak_bytes(contest: Contest) -> int:
    """The most that one step held at once, beyond what was there before it."""
    with contest.off(), packed(*contest.model) as rows:
        take_step(rows, contest.loader, 0)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            take_step(rows, contest.loader, 0)
    with tempfile.TemporaryDirectory() as scratch:
        trace = Path(scratch) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
    return int(np.cumsum([change for _, change in sorted(changes)]).max())


def measure(hidden: int, layers: int, rounds: int) -> list[dict[str, Any]]:
    """A step of each in turn: a ratio is of times that follow each other, whatever the machine does."""
    found = contests(hidden, layers)
    took: dict[str, list[float]] = {name: [] for name in found}
    for step in [*range(CONVERSATIONS // BATCH_SIZE)] * rounds:
        for name, contest in found.items():
            took[name].append(seconds_of(contest, step))
    rows = [
        {
            "lever": name,
            "seconds": statistics.median(times),
            "times": statistics.median(
                t / whole for t, whole in zip(times, took[tables.ALL_ON], strict=True)
            ),
            "peak_bytes": peak_bytes(found[name]),
        }
        for name, times in took.items()
    ]
    return sorted(rows, key=lambda row: -row["times"])


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--hidden", type=int, default=512)
    asked.add_argument("--layers", type=int, default=4)
    asked.add_argument("--rounds", type=int, default=4)
    asked.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = asked.parse_args()
    described = machine()
    shape = {"hidden_size": args.hidden, "layers": args.layers, "vocab_size": VOCABULARY, "dtype": "fp32"}
    results = measure(args.hidden, args.layers, args.rounds)
    told = {
        "date": str(date.today()),
        "machine": described,
        "shape": shape,
        "rounds": args.rounds,
        "results": results,
    }
    args.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(*tables.levers(told), sep="\n")


if __name__ == "__main__":
    main()
