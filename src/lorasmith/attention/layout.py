"""Softmax attention over a Layout: each token sees its own segment's past and the segments it continues.

Shapes: T = tokens of a flat row, L = tokens of a padded batch's row, H = query heads, K = key/value heads,
D = head size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lorasmith.attention.alibi import alibi_bias
from lorasmith.attention.cuda import FlexIndex, cuda_attention, fits_flex
from lorasmith.attention.decay import ChunkIndex, chunk_index
from lorasmith.attention.tiled import TiledIndex, tiled_attention
from lorasmith.types import Layout

LAYOUT_ATTENTION = "lorasmith_layout"
"""The name under which transformers' AttentionInterface knows `layout_attention_interface`."""


_LONG = 256
"""Tokens from which on sdpa, which cuts keys as well as queries, is a fifth faster than tiles."""


@dataclass(frozen=True)
class LayoutIndex:
    """A Layout as indices on one device, made once per batch and used by every layer.

    Each kind of attention asks for its own; none is made in vain.
    """

    layout: Layout
    device: torch.device
    slopes_H: Tensor | None = None
    """ALiBi's, for softmax attention that lowers scores by distance."""

    @cached_property
    def tiles(self) -> TiledIndex:
        """For softmax attention in plain products."""
        return TiledIndex(self.layout, self.device)

    @cached_property
    def all_long(self) -> bool:
        """Whether the row holds long segments alone, and none continues another."""
        return bool((self.layout.parents < 0).all() and self.layout.lengths.min() >= _LONG)

    @cached_property
    def flex(self) -> FlexIndex:
        """For softmax attention in CUDA's own kernels."""
        return FlexIndex(self.layout, self.device)

    @cached_property
    def chunks(self) -> ChunkIndex:
        """For decayed linear attention."""
        return chunk_index(self.layout, self.device)


def layout_index(layout: Layout, device: torch.device | str = "cpu") -> LayoutIndex:
    return LayoutIndex(layout, torch.device(device))


def with_alibi(index: LayoutIndex, slopes_H: Tensor) -> LayoutIndex:
    """The same Layout with ALiBi: made once per forward pass and used by every layer."""
    return replace(index, slopes_H=slopes_H)


def visible(layout: Layout) -> Tensor:
    """Boolean (T, T): the definition of a Layout, written out."""
    segment_T = np.repeat(np.arange(len(layout.parents)), layout.lengths)
    continues = np.eye(len(layout.parents), dtype=bool)
    for segment, parent in enumerate(layout.parents):  # a parent stands before its children
        if parent >= 0:
            continues[segment] |= continues[parent]
    past = np.tril(np.ones((len(segment_T), len(segment_T)), dtype=bool))
    return torch.from_numpy(continues[segment_T][:, segment_T] & past)


def layout_attention(q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, index: LayoutIndex, scale: float) -> Tensor:
    """softmax(q k' * scale + ALiBi) v, each token over what its Layout lets it see.

    Shapes: q (H, T, D), k and v (K, T, D) with K dividing H -> (H, T, D).
    """
    if fits_flex(q_HTD):
        return cuda_attention(q_HTD, k_KTD, v_KTD, index.flex, scale, index.slopes_H)
    if index.slopes_H is None and index.all_long:
        return _attend_each(q_HTD, k_KTD, v_KTD, index.layout, scale)
    return tiled_attention(q_HTD, k_KTD, v_KTD, index.tiles, scale, index.slopes_H)


def _attend_each(q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, layout: Layout, scale: float) -> Tensor:
    """Each segment for itself, by sdpa; out with tokens outermost in memory."""
    grouped, lengths = q_HTD.shape[0] != k_KTD.shape[0], layout.lengths.tolist()
    segments = zip(*(x[None].split(lengths, dim=2) for x in (q_HTD, k_KTD, v_KTD)), strict=True)
    outs = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)[0]
        for q, k, v in segments
    ]
    return outs[0] if len(outs) == 1 else torch.cat([out.transpose(0, 1) for out in outs]).transpose(0, 1)


def attention_reference(
    q_HTD: Tensor,
    k_KTD: Tensor,
    v_KTD: Tensor,
    layout: Layout,
    scale: float,
    slopes_H: Tensor | None = None,
) -> Tensor:
    """`layout_attention` with a dense mask in float64: the definition that the others are checked against."""
    q_HTD, k_HTD, v_HTD = (
        x.double().repeat_interleave(len(q_HTD) // len(x), 0) for x in (q_HTD, k_KTD, v_KTD)
    )
    scores_HTT = q_HTD @ k_HTD.transpose(1, 2) * scale
    if slopes_H is not None:
        positions_T = torch.from_numpy(layout.position_ids)
        scores_HTT = scores_HTT + alibi_bias(slopes_H.double(), positions_T, positions_T)
    return scores_HTT.masked_fill(~visible(layout), float("-inf")).softmax(-1) @ v_HTD


def biased_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(q k' * scale + bias) v with the softmax in the dtype of `bias`, fp32 or wider.

    By hand: sdpa on a GPU misreads a bias that is wider than its queries.
    Shapes: (..., H, L, D) and bias (..., H, L, L) -> what the heads read, and their weights (..., H, L, L).
    """
    weights = ((q @ k.transpose(-1, -2)) * scale + bias).softmax(-1)
    return weights.to(v.dtype) @ v, weights


def biased_attention_interface(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """`biased_attention` in the shape that transformers' AttentionInterface asks for."""
    out_BHLD, weights = biased_attention(query, key, value, attention_mask, scaling)
    return out_BHLD.transpose(1, 2), weights


def layout_attention_interface(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    layout: LayoutIndex | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`layout_attention` in the shape that transformers' AttentionInterface asks for.

    Shapes: query (1, H, T, D), key and value (1, K, T, D) -> ((1, T, H, D), None).
    """
    assert layout is not None, "this attention runs under packed(), with a layout"
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out_HTD = layout_attention(query[0], key[0], value[0], layout, scale)
    return out_HTD.transpose(0, 1)[None], None
