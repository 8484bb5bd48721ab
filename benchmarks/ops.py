"""Times each fused op against its own reference and against the library's, forward and backward.

The library's is what would run without us: transformers' module, peft's layer, torch's own function. Rounds
alternate between the contestants, so that a busy machine slows all of them; the medians are given, and the
minima beside them. Under two minutes on 4 quiet cores. Prints the table of docs/performance.md and writes
ops.json, which holds it.
Legend: T = tokens, N = supervised rows, D = hidden or head size, H = heads, F = features between the MLP's
projections, V = vocabulary.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import tables
import torch
import torch.nn.functional as F
import transformers
from attention import layout_attention, layout_index, prefix_layout, visible
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor
from torch.func import functional_call
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from lorasmith.attention.rotary import reference_rotary, rotary
from lorasmith.ops.cross_entropy import cross_entropy_sum, linear_cross_entropy
from lorasmith.ops.dropout import DropoutMask, dropout, dropout_key
from lorasmith.ops.lora_linear import lora_linear, lora_linear_reference
from lorasmith.ops.rms_norm import reference_rms_norm, rms_norm
from lorasmith.ops.swiglu import reference_swiglu, swiglu

TOKENS, ROWS, HIDDEN, FEATURES, HEADS, RANK = 860, 370, 768, 2048, 12, 8
"""Of a step of the demo-sized measurements: a 160M Llama on packed conversations."""

Function = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """One op on one input; every contestant takes `inputs`, and gradients flow to those that require them."""

    name: str
    inputs: tuple[Tensor, ...]
    contestants: dict[str, Function]
    """"ours", "reference" and "library"."""


def norm_case() -> Case:
    x, weight = torch.randn(TOKENS, HIDDEN, requires_grad=True), torch.rand(HIDDEN) + 0.5
    module = LlamaRMSNorm(HIDDEN, eps=1e-6)
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    contestants: dict[str, Function] = {
        "ours": lambda x: rms_norm(x, weight, 1e-6),
        "reference": lambda x: reference_rms_norm(x, weight, 1e-6),
        "library": module,
    }
    return Case(f"rms_norm T={TOKENS} D={HIDDEN}", (x,), contestants)


def swiglu_case() -> Case:
    inputs = tuple(torch.randn(TOKENS, FEATURES, requires_grad=True) for _ in range(2))
    silu = ACT2FN["silu"]
    contestants: dict[str, Function] = {
        "ours": swiglu,
        "reference": reference_swiglu,
        "library": lambda gate, up: silu(gate) * up,
    }
    return Case(f"swiglu T={TOKENS} F={FEATURES}", inputs, contestants)


def rotary_case() -> Case:
    size = HIDDEN // HEADS
    flat = [torch.randn(1, TOKENS, HEADS, size, requires_grad=True) for _ in range(2)]
    angles = torch.randn(1, TOKENS, size // 2).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    contestants: dict[str, Function] = {
        "ours": lambda q, k: rotary(q.transpose(1, 2), k.transpose(1, 2), cos, sin),
        "reference": lambda q, k: tuple(reference_rotary(x.transpose(1, 2), cos, sin) for x in (q, k)),
        "library": lambda q, k: apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin),
    }
    return Case(f"rotary T={TOKENS} H={HEADS} D={size}", tuple(flat), contestants)


def dropout_case() -> Case:
    x, mask = torch.randn(TOKENS, HIDDEN, requires_grad=True), mask_of(TOKENS)
    contestants: dict[str, Function] = {
        "ours": lambda x: dropout(x, mask),
        "reference": lambda x: x * mask.factors(HIDDEN, x.dtype) * mask.scale,
        "library": lambda x: F.dropout(x, mask.p),
    }
    return Case(f"dropout T={TOKENS} D={HIDDEN}", (x,), contestants)


def lora_case() -> Case:
    """The library's with the same dropout, as it trains."""
    base = torch.nn.Linear(HIDDEN, FEATURES, bias=False).requires_grad_(False)
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=0.1)
    layer = PeftLinear(base, "default", config, r=RANK, lora_alpha=RANK).train()
    x = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    down, up = torch.randn(RANK, HIDDEN, requires_grad=True), torch.randn(FEATURES, RANK, requires_grad=True)
    names, mask = ("lora_A.default.weight", "lora_B.default.weight"), mask_of(TOKENS)
    contestants: dict[str, Function] = {
        "ours": lambda x, a, b: lora_linear(x, base.weight, None, a, b, 1.0, mask),
        "reference": lambda x, a, b: lora_linear_reference(x, base.weight, None, a, b, 1.0, mask),
        "library": lambda x, a, b: functional_call(layer, dict(zip(names, (a, b), strict=True)), (x,)),
    }
    return Case(f"lora_linear T={TOKENS} D={HIDDEN} F={FEATURES} r={RANK}", (x, down, up), contestants)


def attention_case() -> Case:
    """Packed conversations on one prefix; the reference and the library's need a dense mask."""
    layout, size = prefix_layout(), HIDDEN // HEADS
    tokens, index, seen, scale = int(layout.starts[-1]), layout_index(layout), visible(layout), size**-0.5
    inputs = tuple(torch.randn(HEADS, tokens, size, requires_grad=True) for _ in range(3))
    contestants: dict[str, Function] = {
        "ours": lambda q, k, v: layout_attention(q, k, v, index, scale),
        "reference": lambda q, k, v: (q @ k.mT * scale).masked_fill(~seen, -torch.inf).softmax(-1) @ v,
        "library": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, seen, scale=scale),
    }
    return Case(f"layout_attention T={tokens} H={HEADS} D={size}", inputs, contestants)


def mask_of(tokens: int) -> DropoutMask:
    return DropoutMask(0.1, dropout_key(0, 0, "case"), torch.arange(tokens))


def loss_case(vocabulary: int) -> Case:
    hidden, head = torch.randn(ROWS, HIDDEN, requires_grad=True), torch.randn(vocabulary, HIDDEN) * 0.02
    labels, weights = torch.randint(vocabulary, (ROWS,)), torch.ones(ROWS)
    contestants: dict[str, Function] = {
        "ours": lambda hidden: linear_cross_entropy(hidden, head, labels, weights),
        "reference": lambda hidden: cross_entropy_sum(F.linear(hidden, head), labels, weights),
        "library": lambda hidden: F.cross_entropy(F.linear(hidden, head), labels, reduction="sum"),
    }
    return Case(f"linear_cross_entropy N={ROWS} D={HIDDEN} V={vocabulary}", (hidden,), contestants)


CASES: tuple[Callable[[], Case], ...] = (
    norm_case,
    swiglu_case,
    rotary_case,
    dropout_case,
    lora_case,
    attention_case,
    lambda: loss_case(32_000),
    lambda: loss_case(102_400),
)
"""Made one after the other, so that only one case's tensors exist. Add an op here."""


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Milliseconds of forward (under autograd) and of backward, for each contestant."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in case.contestants}
    cotangents: list[Tensor] = []
    for index in range(rounds + 1):
        for name, function in case.contestants.items():
            start = time.perf_counter()
            out = function(*case.inputs)
            middle = time.perf_counter()
            outputs = out if isinstance(out, tuple) else (out,)
            cotangents = cotangents or [torch.randn_like(y) for y in outputs]
            ready = time.perf_counter()
            torch.autograd.grad(outputs, case.inputs, cotangents)
            if index > 0:  # the first round warms up
                times[name].append((middle - start, time.perf_counter() - ready))
    return {"case": case.name, "rounds": rounds, **{name: summary(pairs) for name, pairs in times.items()}}


def summary(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    columns = {
        "forward": [f for f, _ in pairs],
        "backward": [b for _, b in pairs],
        "both": [f + b for f, b in pairs],
    }
    medians = {f"{name}_ms": round(1e3 * statistics.median(x), 3) for name, x in columns.items()}
    return {**medians, "both_min_ms": round(1e3 * min(columns["both"]), 3)}


def machine() -> dict[str, Any]:
    """What a timing means nothing without."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def cpu_model() -> str:
    """As Linux names it, else as Python does."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="2 rounds, and the smaller vocabulary")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"), help="JSON to write")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    cases, rounds = (CASES[:-1], 2) if arguments.quick else (CASES, arguments.rounds)
    described = machine()
    told = {"machine": described, "results": [measure(make(), rounds) for make in cases]}
    arguments.out.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    print(*tables.ops(told), sep="\n")
    print(f"{described['cpu']}, {described['threads']} threads, torch {described['torch']}; {arguments.out}")


if __name__ == "__main__":
    main()
