"""Softmax attention over a Layout in tiles: matmul, softmax, matmul, with the backward written by hand.

A tile is queries of some segments and, for each segment, the keys that they can see: the chain that it
continues, then its own. Segments of like size share a tile; a long one is cut into several. So every product
is a plain batched matmul over hardly more than what the Layout allows, and its scores stay in cache. Nothing
is kept for the backward but q, k and v: scores are made again, and memory is O(T).

Products and softmax are fp32, or float64 for float64 inputs.

Shapes: T = tokens of a flat row, H = query heads, K = key/value heads, G = H / K, D = head size,
N = segments of a tile, Q = queries and J = keys of each, M = queries of all tiles with padding, B = N K,
X = G Q.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorasmith.attention.tiles import Block, Tile, blocks_of
from lorasmith.types import Layout

_SCORES = 1 << 19
"""Scores of one matmul: 2 MiB in fp32, for the second-level caches of the cores that share the work."""


@dataclass(frozen=True)
class TiledIndex:
    """A Layout's tiles on one device, and where each token stands in them."""

    layout: Layout
    device: torch.device

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        return blocks_of(self.layout, self.device)

    @cached_property
    def _rows(self) -> dict[tuple[int, int], HeadRows]:
        return {}

    def rows(self, heads: int, key_heads: int) -> HeadRows:
        """Made by the first layer of these sizes, used by all."""
        sizes = (heads, key_heads)
        if sizes not in self._rows:
            self._rows[sizes] = _head_rows(self.blocks, int(self.layout.starts[-1]), heads, key_heads)
        return self._rows[sizes]


@dataclass(frozen=True)
class HeadRows:
    """The tiles as row indices of the flattened queries (T H, D) and keys (T K, D)."""

    queries: Tensor  # (M H,) tile by tile, (N, H, Q) each
    slots: Tensor  # (T H,) where each query stands among them
    keys: tuple[Tensor, ...]  # (N K J,) of each block


@dataclass(frozen=True)
class _Slice:
    """Consecutive members of a tile's batch B: whole segments, or some heads of one."""

    batch: slice
    segments: slice
    heads: slice


def tiled_attention(
    q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, index: TiledIndex, scale: float, slopes_H: Tensor | None
) -> Tensor:
    """softmax(q k' * scale + ALiBi) v, each token over what the Layout lets it see.

    Fastest where tokens are the outer dimension in memory, as projections leave them.
    Shapes: q (H, T, D), k and v (K, T, D) with K dividing H -> (H, T, D), tokens outermost in memory.
    """
    q_THD, k_TKD, v_TKD = (x.transpose(0, 1).contiguous() for x in (q_HTD, k_KTD, v_KTD))
    out_THD: Tensor = _TiledAttention.apply(q_THD, k_TKD, v_TKD, index, scale, slopes_H)  # type: ignore[no-untyped-call]
    return out_THD.transpose(0, 1)


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, index: TiledIndex, scale: float, slopes_H: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.index, ctx.scale, ctx.slopes_H = index, scale, slopes_H
        rows = index.rows(q.shape[1], k.shape[1])
        outs = torch.empty((len(rows.queries), q.shape[2]), dtype=_wide(q), device=q.device)
        for block, keys in zip(index.blocks, rows.keys, strict=True):
            batch = block.num_segments * k.shape[1]
            k_BJD, v_BJD = (_take(x, keys, batch) for x in (k, v))
            for tile in block.tiles:
                here, end = tile.rows(q.shape[1]), tile.num_keys
                q_BXD = _take(q, rows.queries[here], batch).mul_(scale)
                out_BXD = outs[here].view_as(q_BXD)
                for part in _slices(tile, q_BXD.shape[1], k.shape[1]):
                    at = part.batch
                    weights = _weights(q_BXD[at], k_BJD[at, :end], tile, part, slopes_H)
                    torch.bmm(weights, v_BJD[at, :end], out=out_BXD[at])
        return outs.index_select(0, rows.slots).view(q.shape).to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        index, rows = ctx.index, ctx.index.rows(q.shape[1], k.shape[1])
        d_out = gradients[0].contiguous()
        d_queries = torch.empty((len(rows.queries), q.shape[2]), dtype=_wide(q), device=q.device)
        d_k, d_v = (torch.zeros_like(x, dtype=_wide(x)).flatten(0, 1) for x in (k, v))
        for block, keys in zip(index.blocks, rows.keys, strict=True):
            batch = block.num_segments * k.shape[1]
            k_BJD, v_BJD = (_take(x, keys, batch) for x in (k, v))
            of_keys = (k_BJD, v_BJD, torch.empty_like(k_BJD), torch.empty_like(v_BJD))
            for tile in reversed(block.tiles):  # the last one sees all keys, so it comes first and fills
                here = tile.rows(q.shape[1])
                q_BXD = _take(q, rows.queries[here], batch).mul_(ctx.scale)
                do_BXD = _take(d_out, rows.queries[here], batch)
                if tile.padded:
                    do_BXD.view(block.num_segments, q.shape[1], -1, q.shape[2]).mul_(tile.real_N1Q1)
                of_queries = (q_BXD, do_BXD, d_queries[here].view_as(q_BXD))
                _tile_backward(of_queries, of_keys, tile, k.shape[1], ctx.slopes_H)
            d_k.index_add_(0, keys, of_keys[2].flatten(0, 1))
            d_v.index_add_(0, keys, of_keys[3].flatten(0, 1))
        d_q = d_queries.index_select(0, rows.slots).mul_(ctx.scale)
        d_qkv = (d.view(x.shape).to(x.dtype) for d, x in ((d_q, q), (d_k, k), (d_v, v)))
        return (*d_qkv, None, None, None)


def _tile_backward(
    of_queries: tuple[Tensor, Tensor, Tensor],
    of_keys: tuple[Tensor, Tensor, Tensor, Tensor],
    tile: Tile,
    key_heads: int,
    slopes_H: Tensor | None,
) -> None:
    """From (q, d_out) and (k, v) to d_q, which it fills, and (d_k, d_v), which it adds to after the first."""
    add = tile.num_keys < of_keys[0].shape[1]
    for part in _slices(tile, of_queries[0].shape[1], key_heads):
        q, d_out, d_q = (x[part.batch] for x in of_queries)
        k, v, d_k, d_v = (x[part.batch, : tile.num_keys] for x in of_keys)
        weights = _weights(q, k, tile, part, slopes_H)
        _product(weights.transpose(1, 2), d_out, d_v, add)
        d_weights = torch.bmm(d_out, v.transpose(1, 2))
        d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
        _product(d_scores.transpose(1, 2), q, d_k, add)
        torch.bmm(d_scores, k, out=d_q)


def _product(left: Tensor, right: Tensor, into: Tensor, add: bool) -> None:
    if add:
        into.baddbmm_(left, right)
    else:
        torch.bmm(left, right, out=into)


def _weights(q_BXD: Tensor, k_BJD: Tensor, tile: Tile, part: _Slice, slopes_H: Tensor | None) -> Tensor:
    """What each query takes of each key, (B, G Q, J), for queries that are scaled already."""
    scores = torch.bmm(q_BXD, k_BJD.transpose(1, 2))
    segments, heads = part.segments.stop - part.segments.start, part.heads.stop - part.heads.start
    scores_NKGQJ = scores.view(segments, heads, -1, tile.num_queries, tile.num_keys)
    if slopes_H is not None:
        groups = scores_NKGQJ.shape[2]
        slopes_KG = slopes_H.view(-1, groups)[part.heads].to(scores.dtype)
        scores_NKGQJ += slopes_KG[:, :, None, None] * tile.distances_NJ[part.segments, None, None, None]
    masked = tile.mask_NQJ.shape[2]
    scores_NKGQJ[..., -masked:] += tile.mask_NQJ[part.segments, None, None]
    return scores.softmax(-1)


def _take(x_THD: Tensor, rows: Tensor, batch: int) -> Tensor:
    """Rows of D as (batch, rows / batch, D), in the dtype of the products: a copy, free to be written to."""
    taken: Tensor = x_THD.flatten(0, 1).index_select(0, rows)
    return taken.to(_wide(x_THD)).view(batch, -1, x_THD.shape[2])


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _slices(tile: Tile, rows: int, key_heads: int) -> Iterator[_Slice]:
    """`rows` = G Q, the queries of one member."""
    segments, step = len(tile.tokens_NQ), max(1, _SCORES // (rows * tile.num_keys))
    if step >= key_heads:
        step //= key_heads
        for first in range(0, segments, step):
            last = min(first + step, segments)
            yield _Slice(slice(first * key_heads, last * key_heads), slice(first, last), slice(0, key_heads))
        return
    for segment in range(segments):
        for first in range(0, key_heads, step):
            last, at = min(first + step, key_heads), segment * key_heads
            yield _Slice(slice(at + first, at + last), slice(segment, segment + 1), slice(first, last))


def _head_rows(blocks: tuple[Block, ...], tokens: int, heads: int, key_heads: int) -> HeadRows:
    tiles = [tile for block in blocks for tile in block.tiles]
    queries = torch.cat([_by_head(tile.tokens_NQ, heads) for tile in tiles])
    real = torch.cat([tile.real_NQ[:, None].expand(-1, heads, -1).flatten() for tile in tiles])
    places = torch.nonzero(real)[:, 0]
    slots = torch.empty(tokens * heads, dtype=torch.long, device=queries.device)
    slots[queries[places]] = places
    return HeadRows(queries, slots, tuple(_by_head(block.keys_NJ, key_heads) for block in blocks))


def _by_head(tokens_NQ: Tensor, heads: int) -> Tensor:
    """Token indices as row indices of (T H, D), in the order (N, H, Q)."""
    numbers_H1 = torch.arange(heads, device=tokens_NQ.device)[:, None]
    return (tokens_NQ[:, None] * heads + numbers_H1).flatten()
