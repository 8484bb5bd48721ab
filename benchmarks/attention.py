"""One layer's attention, forward and backward, beside what it could be: `python benchmarks/attention.py`.

Times are CPU seconds of one thread, the least of alternating runs: a busy machine disturbs them little.

Shapes: T = tokens of a flat row, S = segments, L = longest conversation, H = heads, D = head size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from lorasmith.attention.alibi import alibi_slopes
from lorasmith.attention.cuda import flex
from lorasmith.attention.decay import decay_attention
from lorasmith.attention.layout import layout_attention, layout_index, visible
from lorasmith.types import Layout

FLOPS_PER_TOKEN = 28e6
"""Of the projections of a layer of 7.1 million parameters: forward, and gradients of the activations."""

Step = Callable[[], object]


def prefix_layout(conversations: int = 16, prefix: int = 11, mean: int = 53) -> Layout:
    """Conversations of 20 to 120 tokens that all continue one short prefix."""
    own = np.random.default_rng(0).gamma(4, mean / 4, conversations).astype(int).clip(20, 120)
    starts = np.concatenate([[0], np.cumsum([prefix, *own])])
    positions = np.concatenate([np.arange(prefix), *[prefix + np.arange(n) for n in own]])
    return Layout(starts, np.array([-1] + [0] * conversations), positions)


def single_layout(tokens: int) -> Layout:
    return Layout(np.array([0, tokens]), np.array([-1]), np.arange(tokens))


def attention_steps(layout: Layout, heads: int = 12, size: int = 64) -> dict[str, Step]:
    """Forward and backward of each way to attend over `layout`, by name."""
    tokens, index, seen, scale = int(layout.starts[-1]), layout_index(layout), visible(layout), size**-0.5
    leaves = [torch.randn(tokens, heads, size).transpose(0, 1).requires_grad_() for _ in range(3)]
    gradient = torch.randn(tokens, heads, size).transpose(0, 1)

    def step(attend: Callable[..., Tensor]) -> Step:
        return lambda: torch.autograd.grad(attend(*leaves), leaves, gradient)

    return {
        "tiles": step(lambda q, k, v: layout_attention(q, k, v, index, scale)),
        "sdpa, dense mask": step(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, seen, scale=scale)),
        "matmul, dense mask": step(
            lambda q, k, v: (q @ k.mT * scale).masked_fill(~seen, -torch.inf).softmax(-1) @ v
        ),
        "sdpa, padded conversations": padded_sdpa(layout, heads, size),
    }


def flex_steps(layout: Layout, heads: int = 12, size: int = 64) -> dict[str, Step]:
    """Forward alone: on a CPU FlexAttention has no backward."""
    tokens, index = int(layout.starts[-1]), layout_index(layout)
    q, k, v = torch.randn(3, heads, tokens, size)
    return {
        "tiles, forward": lambda: layout_attention(q, k, v, index, size**-0.5),
        "flex eager, forward": lambda: flex(flex_attention, q, k, v, index.flex, size**-0.5, None),
    }


def padded_sdpa(layout: Layout, heads: int, size: int) -> Step:
    """Each conversation with its prefix, right-padded to the longest: no packing, no sharing."""
    longest = int(layout.position_ids.max()) + 1
    children = len(layout.parents) - len(np.unique(layout.parents[layout.parents >= 0]))
    leaves = [torch.randn(children, heads, longest, size, requires_grad=True) for _ in range(3)]
    gradient = torch.randn(children, heads, longest, size)
    return lambda: torch.autograd.grad(
        F.scaled_dot_product_attention(*leaves, is_causal=True), leaves, gradient
    )


def decay_step(layout: Layout, heads: int = 12, size: int = 64) -> Step:
    """Forward and backward of TransNormer's attention."""
    tokens, index = int(layout.starts[-1]), layout_index(layout).chunks
    leaves = [torch.randn(tokens, heads, size, requires_grad=True) for _ in range(3)]
    decay, gradient = torch.tensor(alibi_slopes(heads)), torch.randn(tokens, heads, size)
    return lambda: torch.autograd.grad(decay_attention(*leaves, decay, index)[0], leaves, gradient)


def least_seconds(steps: Mapping[str, Step], runs: int = 7) -> dict[str, float]:
    """Of alternating runs, after one that is not counted."""
    least = dict.fromkeys(steps, float("inf"))
    for run in range(runs + 1):
        for name, step in steps.items():
            start = time.thread_time()
            step()
            least[name] = least[name] if run == 0 else min(least[name], time.thread_time() - start)
    return least


def projections(tokens: int) -> Step:
    """As many floating-point operations as a layer's projections do, in one product."""
    x, weight = torch.randn(tokens, 768), torch.randn(768, round(FLOPS_PER_TOKEN / 2 / 768))
    return lambda: x @ weight


def main() -> None:
    torch.set_num_threads(1)
    short, long = prefix_layout(), single_layout(2048)
    cases: dict[str, dict[str, Step]] = {
        f"{short.starts[-1]} tokens, 16 segments on a prefix": {
            **attention_steps(short),
            "decayed": decay_step(short),
            "the layer's projections": projections(int(short.starts[-1])),
        },
        "the same, forward": flex_steps(short),
        "one segment of 2048": attention_steps(long),
    }
    for title, steps in cases.items():
        print(title)
        for name, seconds in least_seconds(steps).items():
            print(f"  {name:28} {seconds * 1e3:8.1f} ms")


if __name__ == "__main__":
    main()
