"""Softmax attention over a Layout: each token sees its own segment's past and the segments it continues.

Shapes: T = tokens of a flat row, S = segments, L = longest segment, H = query heads, K = key/value heads,
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

from lorasmith.ops.alibi import alibi_bias
from lorasmith.ops.decay_attention import ChunkIndex, chunk_index
from lorasmith.types import Layout

LAYOUT_ATTENTION = "lorasmith_layout"
"""The name under which transformers' AttentionInterface knows `layout_attention_interface`."""


@dataclass(frozen=True)
class LayoutIndex:
    """A Layout as indices on one device, made once per batch and used by every layer.

    Each kind of attention asks for its own; none is made in vain, and only softmax over shared prefixes costs
    T x T.
    """

    layout: Layout
    device: torch.device
    slopes_H: Tensor | None = None
    """ALiBi's, for softmax attention that lowers scores by distance."""

    @cached_property
    def segments(self) -> SegmentIndex | None:
        """None where segments share prefixes."""
        if (self.layout.parents >= 0).any():
            return None
        lengths, starts = self.layout.lengths, self.layout.starts[:-1]
        columns = np.arange(lengths.max())
        inside = columns < lengths[:, None]
        tokens = torch.from_numpy(np.where(inside, starts[:, None] + columns, starts[:, None]))
        slots = torch.from_numpy(np.flatnonzero(inside))
        return SegmentIndex(tokens.to(self.device), slots.to(self.device))

    @cached_property
    def visible_TT(self) -> Tensor:
        """Whether token t (row) sees token s (column)."""
        return visible(self.layout).to(self.device)

    @cached_property
    def bias(self) -> Tensor | None:
        """ALiBi, -inf where a token may not look: (H, L, L), or (H, T, T) for shared prefixes."""
        if self.slopes_H is None:
            return None
        if self.segments is None:
            positions, sees = torch.from_numpy(self.layout.position_ids).to(self.device), self.visible_TT
        else:
            positions = torch.arange(self.segments.tokens_SL.shape[1], device=self.device)
            sees = positions <= positions[:, None]
        return alibi_bias(self.slopes_H, positions, positions).masked_fill(~sees, float("-inf"))

    @cached_property
    def chunks(self) -> ChunkIndex:
        return chunk_index(self.layout, self.device)


@dataclass(frozen=True)
class SegmentIndex:
    """Segments that continue no other, as gather indices."""

    tokens_SL: Tensor
    """Token indices of each segment, right-padded with its first."""
    slots_T: Tensor
    """Where each token stands in the flattened tokens_SL."""


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
    """softmax(q k' * scale) v, each token over what its Layout lets it see.

    Shapes: q (H, T, D), k and v (K, T, D) with K dividing H -> (H, T, D).
    """
    segments = index.segments
    if segments is None:
        return _attend(q_HTD[None], k_KTD[None], v_KTD[None], scale, index.bias, index.visible_TT)[0]
    rows, columns = segments.tokens_SL.shape
    by_segment = [
        x.index_select(1, segments.tokens_SL.flatten()).unflatten(1, (rows, columns)).transpose(0, 1)
        for x in (q_HTD, k_KTD, v_KTD)
    ]
    out_SHLD = _attend(by_segment[0], by_segment[1], by_segment[2], scale, index.bias, None)
    return out_SHLD.transpose(0, 1).flatten(1, 2).index_select(1, segments.slots_T)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, mask: Tensor | None
) -> Tensor:
    if bias is not None:
        return biased_attention(q, k, v, bias, scale)[0]
    grouped = q.shape[1] != k.shape[1]
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
    assert layout is not None, "this attention runs under packed(), with a layout"
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out_HTD = layout_attention(query[0], key[0], value[0], layout, scale)
    return out_HTD.transpose(0, 1)[None], None
