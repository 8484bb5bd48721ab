"""Softmax attention over a Layout: each token sees its own segment's past and the segments it continues.

Shapes: T = tokens of a flat row, S = segments, L = longest segment, H = query heads, K = key/value heads,
D = head size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lorasmith.ops.alibi import alibi_bias
from lorasmith.types import Layout

LAYOUT_ATTENTION = "lorasmith_layout"
"""The name under which transformers' AttentionInterface knows `layout_attention_interface`."""


@dataclass(frozen=True)
class LayoutIndex:
    """A Layout as gather indices on one device, made once per batch and used by every layer."""

    segments_SL: Tensor | None
    """Token indices of each segment, right-padded with its first; None where segments share prefixes."""
    tokens_T: Tensor | None
    """Where each token stands in the flattened segments_SL."""
    visible_TT: Tensor | None
    """For shared prefixes: whether token t (row) sees token s (column)."""
    positions_T: Tensor
    """Of each token in its own conversation."""
    bias: Tensor | None = None
    """Added to the scores, -inf where a token may not look: (H, L, L), or (H, T, T) for shared prefixes."""


def layout_index(layout: Layout, device: torch.device | str = "cpu") -> LayoutIndex:
    positions_T = torch.from_numpy(layout.position_ids).to(device)
    if (layout.parents >= 0).any():
        return LayoutIndex(None, None, visible(layout).to(device), positions_T)
    lengths, starts = layout.lengths, layout.starts[:-1]
    columns = np.arange(lengths.max())
    inside = columns < lengths[:, None]
    segments = torch.from_numpy(np.where(inside, starts[:, None] + columns, starts[:, None])).to(device)
    tokens_T = torch.from_numpy(np.flatnonzero(inside)).to(device)
    return LayoutIndex(segments, tokens_T, None, positions_T)


def with_alibi(index: LayoutIndex, slopes_H: Tensor) -> LayoutIndex:
    """The same Layout with ALiBi: made once per forward pass and used by every layer."""
    if index.segments_SL is None:
        positions, sees = index.positions_T, index.visible_TT
    else:
        positions = torch.arange(index.segments_SL.shape[1], device=slopes_H.device)
        sees = positions <= positions[:, None]
    assert sees is not None
    bias = alibi_bias(slopes_H, positions, positions).masked_fill(~sees, float("-inf"))
    return replace(index, bias=bias)


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
    """softmax(q k' * scale) v, each token over what its Layout lets it see.

    Shapes: q (H, T, D), k and v (K, T, D) with K dividing H -> (H, T, D).
    """
    if index.segments_SL is None or index.tokens_T is None:
        return _attend(q_HTD[None], k_KTD[None], v_KTD[None], scale, index)[0]
    rows, columns = index.segments_SL.shape
    by_segment = [
        x.index_select(1, index.segments_SL.flatten()).unflatten(1, (rows, columns)).transpose(0, 1)
        for x in (q_HTD, k_KTD, v_KTD)
    ]
    out_SHLD = _attend(by_segment[0], by_segment[1], by_segment[2], scale, index)
    return out_SHLD.transpose(0, 1).flatten(1, 2).index_select(1, index.tokens_T)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, index: LayoutIndex) -> Tensor:
    if index.bias is not None:
        return biased_attention(q, k, v, index.bias, scale)[0]
    grouped, mask = q.shape[1] != k.shape[1], index.visible_TT
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )


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
    assert layout is not None, "the packed attention runs under packed_attention(), with a layout"
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out_HTD = layout_attention(query[0], key[0], value[0], layout, scale)
    return out_HTD.transpose(0, 1)[None], None
