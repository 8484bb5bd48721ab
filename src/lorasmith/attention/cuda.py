"""Softmax attention over a Layout on CUDA: FlexAttention with the Layout as its block mask, or
FlashAttention's varlen function where it is installed and no segment continues another.

Not measured: written and checked (mask, scores, eager path) on a CPU.

Shapes: T = tokens of a flat row, S = segments, H = query heads, K = key/value heads, D = head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from lorasmith.ops.transfer import on_device
from lorasmith.types import Ints, Layout

_BLOCK = 128
"""Tokens of a block of its masks."""
_SMALLEST_HEAD = 16
"""FlexAttention compiles for heads of this size and more."""


@dataclass(frozen=True)
class FlexIndex:
    """A Layout as what FlexAttention and FlashAttention ask for, on one device."""

    layout: Layout
    device: torch.device

    @property
    def shares(self) -> bool:
        return bool((self.layout.parents >= 0).any())

    @cached_property
    def bounds_TT(self) -> tuple[Tensor, Tensor]:
        """For each token, its segment's number in depth-first order and that behind its last descendant."""
        enter_S, leave_S = _depth_first(self.layout.parents)
        enter_T, leave_T = (np.repeat(x, self.layout.lengths) for x in (enter_S, leave_S))
        return on_device(enter_T, self.device), on_device(leave_T, self.device)

    @cached_property
    def position_ids(self) -> Tensor:
        return on_device(self.layout.position_ids, self.device)

    @cached_property
    def block_mask(self) -> BlockMask:
        tokens = int(self.layout.starts[-1])
        return create_block_mask(self.sees, None, None, tokens, tokens, device=str(self.device))

    @cached_property
    def starts(self) -> Tensor:
        """(S + 1,) in int32, as FlashAttention wants them."""
        return on_device(self.layout.starts, self.device).to(torch.int32)

    @property
    def sees(self) -> Callable[..., Tensor]:
        """FlexAttention's mask_mod: the key is past, and its segment is the query's or an ancestor of it."""
        enter_T, leave_T = self.bounds_TT

        def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            continues = (enter_T[key] <= enter_T[query]) & (enter_T[query] < leave_T[key])
            return (key <= query) & continues

        return mask

    def alibi(self, slopes_H: Tensor) -> Callable[..., Tensor]:
        """FlexAttention's score_mod."""
        positions_T = self.position_ids

        def biased(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return score + slopes_H[head] * (positions_T[key] - positions_T[query])

        return biased


def fits_flex(q_HTD: Tensor) -> bool:
    """Rows of whole blocks, as training pads them: each other length would be one more compilation."""
    tokens, size = q_HTD.shape[-2:]
    return q_HTD.is_cuda and q_HTD.dtype != torch.float64 and size >= _SMALLEST_HEAD and tokens % _BLOCK == 0


def cuda_attention(
    q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, index: FlexIndex, scale: float, slopes_H: Tensor | None
) -> Tensor:
    """softmax(q k' * scale + ALiBi) v, each token over what the Layout lets it see.

    Shapes: q (H, T, D), k and v (K, T, D) with K dividing H -> (H, T, D).
    """
    if slopes_H is None and not index.shares and _fits_flash(q_HTD):
        return _flash(q_HTD, k_KTD, v_KTD, index, scale)
    return flex(_compiled(), q_HTD, k_KTD, v_KTD, index, scale, slopes_H)


def flex(
    kernel: Callable[..., Any],
    q_HTD: Tensor,
    k_KTD: Tensor,
    v_KTD: Tensor,
    index: FlexIndex,
    scale: float,
    slopes_H: Tensor | None,
) -> Tensor:
    """`kernel` is flex_attention, compiled or not."""
    out: Tensor = kernel(
        *(q_HTD[None], k_KTD[None], v_KTD[None]),
        score_mod=None if slopes_H is None else index.alibi(slopes_H),
        block_mask=index.block_mask,
        scale=scale,
        enable_gqa=q_HTD.shape[0] != k_KTD.shape[0],
    )
    return out[0]


@cache
def _compiled() -> Callable[..., Any]:
    """Once for all row lengths: rows differ from step to step."""
    return torch.compile(flex_attention, dynamic=True)


def _fits_flash(q_HTD: Tensor) -> bool:
    half = q_HTD.dtype in (torch.float16, torch.bfloat16)
    return half and q_HTD.shape[-1] <= 256 and find_spec("flash_attn") is not None


def _flash(q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, index: FlexIndex, scale: float) -> Tensor:
    longest = int(index.layout.lengths.max())
    out_THD: Tensor = import_module("flash_attn").flash_attn_varlen_func(
        *(x.transpose(0, 1) for x in (q_HTD, k_KTD, v_KTD)),
        cu_seqlens_q=index.starts,
        cu_seqlens_k=index.starts,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scale,
        causal=True,
    )
    return out_THD.transpose(0, 1)


def _depth_first(parents: Ints) -> tuple[Ints, Ints]:
    """Number of each segment when every one is followed by its descendants, and the number behind the last.

    One segment continues another, or itself, just if its number lies between these two.
    """
    sizes = np.ones(len(parents), dtype=np.int64)
    for segment in range(len(parents) - 1, -1, -1):
        if parents[segment] >= 0:
            sizes[parents[segment]] += sizes[segment]
    free, enter, root = np.zeros(len(parents), dtype=np.int64), np.zeros(len(parents), dtype=np.int64), 0
    for segment, parent in enumerate(parents):  # a parent stands before its children
        enter[segment] = root if parent < 0 else free[parent]
        if parent < 0:
            root += sizes[segment]
        else:
            free[parent] += sizes[segment]
        free[segment] = enter[segment] + 1
    return enter, enter + sizes
