"""Times each fused op against its own reference and against transformers' module, forward and backward.

Writes a JSON with the machine (benchmarks/ops.json by default) and prints a table. Rounds alternate between
the contestants, so that a busy machine slows all of them; the medians are given, and the minima beside them.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from lorasmith.attention.rotary import reference_rotary, rotary
from lorasmith.ops.cross_entropy import cross_entropy_sum, linear_cross_entropy
from lorasmith.ops.rms_norm import reference_rms_norm, rms_norm
from lorasmith.ops.swiglu import reference_swiglu, swiglu

TOKENS, ROWS, HIDDEN, FEATURES, HEADS = 860, 370, 768, 2048, 12
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


def table(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    names = ("ours", "reference", "library")
    heads = "".join(f"{name:>16s}" for name in names)
    yield f"{'median ms (forward + backward)':48s}{heads}{'speed-up':>10s}{'of minima':>10s}"
    for result in results:
        cells = [result[name] for name in names]
        columns = "".join(f"{c['forward_ms']:8.2f}+{c['backward_ms']:<7.2f}" for c in cells)
        ratios = (cells[2][key] / cells[0][key] for key in ("both_ms", "both_min_ms"))
        yield f"{result['case']:48s}{columns}{''.join(f'{ratio:9.2f}x' for ratio in ratios)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--quick", action="store_true", help="3 rounds instead of 20, and the smaller vocabulary"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"), help="JSON to write")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    cases = CASES[:-1] if arguments.quick else CASES
    described = machine()
    results = [measure(make(), rounds=3 if arguments.quick else 20) for make in cases]
    text = json.dumps({"machine": described, "results": results}, indent=2)
    arguments.out.write_text(text + "\n", encoding="utf-8")
    print(*table(results), sep="\n")
    print(f"{described['cpu']}, {described['threads']} threads, torch {described['torch']}; {arguments.out}")


if __name__ == "__main__":
    main()
