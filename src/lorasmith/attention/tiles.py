"""How a Layout is cut into tiles for attention: which queries are computed together, and over which keys.

Shapes: T = tokens of a flat row, S = segments, N = segments of a tile, Q = queries and J = keys of each,
W = trailing keys that not every query sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from lorasmith.ops.transfer import on_device
from lorasmith.types import Ints, Layout

TILE = 128
"""Queries of a tile, at most. A longer segment is cut, and its early queries never meet its late keys."""

_TILE_COST = 4000
"""What a tile costs beside its scores, in scores per head: best of several at 12 heads of 64."""
_WIDTH = 8
"""Scores are a multiple of this wide: a matmul to 111 columns takes longer than to 112."""
_KEYS = 4096
"""Tokens that a block's keys may fill, so that copies of a shared prefix stay few."""


@dataclass(frozen=True)
class Tile:
    """Queries of N segments, padded to one length, and what each sees of its block's first J keys."""

    start: int
    """Where the tile begins in the row of all tiles, in tokens."""
    tokens_NQ: Tensor
    """Token indices, right-padded with the first."""
    real_NQ: Tensor
    """False at padding."""
    num_keys: int
    mask_NQJ: Tensor
    """(N, Q, W), to be added to the scores of the last W keys: 0, or -inf for the future and padding."""
    distances_NJ: Tensor
    """Position of each key, less that of the segment's last query here; what ALiBi's slopes multiply."""

    padded: bool
    """Whether any of `real_NQ` is False."""

    @property
    def num_queries(self) -> int:
        return self.tokens_NQ.shape[1]

    @property
    def real_N1Q1(self) -> Tensor:
        """To be multiplied by what every head has of every query."""
        return self.real_NQ[:, None, :, None]

    def rows(self, heads: int) -> slice:
        """Where the tile's queries stand among those of all tiles, with a row for each head."""
        return slice(self.start * heads, (self.start + self.tokens_NQ.numel()) * heads)


@dataclass(frozen=True)
class Block:
    """Segments whose keys are gathered together, and the tiles that share these keys."""

    keys_NJ: Tensor
    """The chain that each segment continues, then itself, right-padded with its own first token."""
    tiles: tuple[Tile, ...]

    @property
    def num_segments(self) -> int:
        return len(self.keys_NJ)


def blocks_of(layout: Layout, device: torch.device | str = "cpu") -> tuple[Block, ...]:
    """Cut so that padding and the number of tiles cost least. Parents stand before their children."""
    keys = _keys(layout)
    lengths, key_lengths = layout.lengths, np.array([len(k) for k in keys])
    order = np.lexsort((lengths, key_lengths))
    order = order[lengths[order] > 0]
    long = lengths[order] > TILE
    blocks: list[Block] = []
    start = 0
    for members in [*_groups(order[~long], lengths, key_lengths), *order[long][:, None]]:
        blocks.append(_block(layout, [keys[s] for s in members], lengths[members], start, device))
        start += sum(tile.tokens_NQ.numel() for tile in blocks[-1].tiles)
    return tuple(blocks)


def _keys(layout: Layout) -> list[Ints]:
    """All tokens that the last token of each segment sees, in order."""
    keys: list[Ints] = []
    for segment, parent in enumerate(layout.parents):
        own = np.arange(layout.starts[segment], layout.starts[segment + 1])
        keys.append(own if parent < 0 else np.concatenate([keys[parent], own]))
    return keys


def _groups(order: Ints, lengths: Ints, key_lengths: Ints) -> list[Ints]:
    """Consecutive members of `order`, grouped so that the scores and the number of groups cost least."""
    queries, keys = lengths[order], key_lengths[order]
    best, cut = np.zeros(len(order) + 1), np.zeros(len(order) + 1, dtype=np.int64)
    for last in range(1, len(order) + 1):
        firsts = np.arange(max(0, last - max(1, _KEYS // int(keys[last - 1]))), last)
        widest = np.maximum.accumulate(queries[firsts][::-1])[::-1]
        costs = best[firsts] + (last - firsts) * widest * keys[last - 1] + _TILE_COST
        cut[last] = firsts[np.argmin(costs)]
        best[last] = costs.min()
    groups, last = [], len(order)
    while last:
        groups.append(order[cut[last] : last])
        last = cut[last]
    return groups[::-1]


def _block(layout: Layout, keys: list[Ints], lengths: Ints, start: int, device: torch.device | str) -> Block:
    firsts = np.array([k[-n] for k, n in zip(keys, lengths, strict=True)])
    keys_NJ = np.repeat(firsts[:, None], _wide(max(map(len, keys))), axis=1)
    for row, tokens in zip(keys_NJ, keys, strict=True):
        row[: len(tokens)] = tokens
    before_N = np.array([len(k) for k in keys]) - lengths
    count = -(-int(lengths.max()) // TILE)
    bounds = np.linspace(0, lengths.max(), count + 1).astype(np.int64)
    tiles = []
    for first, last in pairwise(bounds.tolist()):
        tiles.append(_tile(layout, keys_NJ, before_N, lengths, (first, last), start, device))
        start += tiles[-1].tokens_NQ.numel()
    return Block(on_device(keys_NJ, device), tuple(tiles))


def _tile(
    layout: Layout,
    keys_NJ: Ints,
    before_N: Ints,
    lengths_N: Ints,
    bounds: tuple[int, int],
    start: int,
    device: torch.device | str,
) -> Tile:
    """Queries bounds[0]:bounds[1] of segments behind `before_N` keys of the segments that they continue."""
    first, last = bounds
    whole = len(keys_NJ) > 1
    columns_Q = np.arange(first, last)
    real_NQ = columns_Q < lengths_N[:, None]
    offsets_NQ = np.where(real_NQ, columns_Q, first)
    slots_NQ = before_N[:, None] + offsets_NQ
    num_keys = keys_NJ.shape[1] if whole else _wide(int(slots_NQ.max()) + 1)
    columns_J = np.arange(0 if whole else int(slots_NQ.min()), num_keys)
    mask_NQJ = np.where(columns_J <= slots_NQ[:, :, None], 0.0, -np.inf).astype(np.float32)
    tokens_NQ = np.take_along_axis(keys_NJ, slots_NQ, axis=1)
    positions_NJ = layout.position_ids[keys_NJ[:, :num_keys]]
    distances_NJ = positions_NJ - layout.position_ids[tokens_NQ].max(axis=1, keepdims=True)
    of_tile = (on_device(x, device) for x in (tokens_NQ, real_NQ, mask_NQJ, distances_NJ))
    tokens, real, mask, distances = of_tile
    return Tile(start, tokens, real, num_keys, mask, distances, padded=not real_NQ.all())


def _wide(keys: int) -> int:
    return -(-keys // _WIDTH) * _WIDTH
