"""Linear attention with a decay per head: o_i = sum_{j <= i} exp(-s_h (i - j)) (q_i . k_j) v_j.

There is no softmax, no scale and no denominator, so the past of a token is one matrix per head, the state
S_i = exp(-s_h) S_{i-1} + k_i v_i', and o_i = q_i S_i. The scan cuts every segment into chunks of C tokens:
inside a chunk the sum is written out (C x C), between chunks only the state is handed on. Chunks that stand
equally far from the beginning of their conversations form a level and are computed together. Memory is O(T).

Shapes: B = rows of a batch, T = tokens of a flat row, H = heads, D = size of q and k, E = size of v,
N = chunks, C = tokens of a chunk, S = segments, R = roots (segments without a parent).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lorasmith.types import Ints, Layout

CHUNK = 64
"""Tokens of a chunk. Scores cost C per token and states D * E / C."""


@dataclass(frozen=True)
class ChunkIndex:
    """A Layout cut into chunks, on one device; a chunk comes after the one that it continues."""

    tokens_NC: Tensor
    """Token indices of each chunk, right-padded with its first."""
    lengths_N: Tensor
    slots_T: Tensor
    """Where each token stands in the flattened tokens_NC."""
    levels: tuple[Tensor, ...]
    """For the chunks of each level: which chunk of the level before they continue. Level 0: the roots."""
    last_S: Tensor
    """The last chunk of each segment."""


def chunk_index(layout: Layout, device: torch.device | str = "cpu", chunk: int = CHUNK) -> ChunkIndex:
    """Segments must not be empty, and parents stand before their children."""
    lengths_N, segment_N, rank_N = _cut(layout.lengths, chunk)
    level_N = rank_N + _first_levels(layout, chunk)[segment_N]
    order_N = np.argsort(level_N, kind="stable")
    place_N = np.argsort(order_N)
    last_S = np.cumsum(np.bincount(segment_N, minlength=len(layout.parents))) - 1
    columns_C = np.arange(chunk)
    starts_N = layout.starts[segment_N] + rank_N * chunk
    inside_NC = columns_C < lengths_N[:, None]
    tokens_NC = np.where(inside_NC, starts_N[:, None] + columns_C, starts_N[:, None])
    slots_NC = place_N[:, None] * chunk + columns_C

    before_N = np.where(rank_N > 0, np.arange(len(rank_N)) - 1, last_S[layout.parents[segment_N]])
    levels = _levels(level_N[order_N], place_N[before_N][order_N])
    return ChunkIndex(
        tokens_NC=torch.from_numpy(tokens_NC[order_N]).to(device),
        lengths_N=torch.from_numpy(lengths_N[order_N]).to(device),
        slots_T=torch.from_numpy(slots_NC[inside_NC]).to(device),
        levels=torch.from_numpy(np.concatenate(levels)).to(device).split([len(level) for level in levels]),
        last_S=torch.from_numpy(place_N[last_S]).to(device),
    )


def rows_index(rows: int, length: int, device: torch.device, chunk: int = CHUNK) -> ChunkIndex:
    """For `rows` independent rows of `length` tokens, laid end to end."""
    starts, parents = np.arange(rows + 1) * length, np.full(rows, -1)
    return chunk_index(Layout(starts, parents, np.tile(np.arange(length), rows)), device, min(chunk, length))


def decay_attention(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THE: Tensor,
    decay_H: Tensor,
    index: ChunkIndex,
    state_RHDE: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum over each token's own segment and the segments that it continues.

    `decay_H` is s_h >= 0; `state_RHDE` is what the roots start from, zero by default. Products, decays and
    states are fp32 for fp16 and bf16 inputs. Returns the outputs (T, H, E), in fp32 or the inputs' own larger
    dtype, and the state at the end of each segment (S, H, D, E).

    For its backward it keeps its inputs only: scores and states, some five times as large, are made again.
    """
    if not torch.is_grad_enabled():
        return _attend(q_THD, k_THD, v_THE, decay_H, index, state_RHDE)
    again: tuple[Tensor, Tensor] = checkpoint(
        *(_attend, q_THD, k_THD, v_THE, decay_H, index, state_RHDE),
        use_reentrant=False,
        preserve_rng_state=False,
    )
    return again


def _attend(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THE: Tensor,
    decay_H: Tensor,
    index: ChunkIndex,
    state_RHDE: Tensor | None,
) -> tuple[Tensor, Tensor]:
    q_NHCD, k_NHCD, v_NHCE = (_by_chunk(x, index) for x in (q_THD, k_THD, v_THE))
    decay_H = decay_H.to(q_NHCD.dtype)
    steps_C = torch.arange(1, q_NHCD.shape[2] + 1, device=decay_H.device)

    to_end_NHC = _falloff(decay_H, index.lengths_N[:, None] - steps_C)
    added_NHDE = k_NHCD.transpose(2, 3) @ (v_NHCE * to_end_NHC[..., None])
    through_NH11 = _falloff(decay_H, index.lengths_N[:, None])[..., None]
    before_NHDE = _scan(added_NHDE, through_NH11, index, state_RHDE)
    last = index.last_S
    end_SHDE = _select(before_NHDE, last) * through_NH11[last] + _select(added_NHDE, last)

    between_HCC = _falloff(decay_H, steps_C[:, None] - steps_C).transpose(0, 1)
    inside_NHCE = (q_NHCD @ k_NHCD.transpose(2, 3) * between_HCC) @ v_NHCE
    past_NHCE = (q_NHCD @ before_NHDE) * _falloff(decay_H, steps_C[None])[..., None]
    out_NCHE = (inside_NHCE + past_NHCE).transpose(1, 2)
    return _select(out_NCHE.flatten(0, 1), index.slots_T), end_SHDE


def decay_step(
    q_BHD: Tensor, k_BHD: Tensor, v_BHE: Tensor, decay_H: Tensor, state_BHDE: Tensor
) -> tuple[Tensor, Tensor]:
    """One more token in each row of a batch: outputs (B, H, E) and the new state, in the state's dtype."""
    q_BHD, k_BHD, v_BHE = (x.to(state_BHDE.dtype) for x in (q_BHD, k_BHD, v_BHE))
    fall_H11 = torch.exp(-decay_H.to(state_BHDE.dtype))[:, None, None]
    state_BHDE = state_BHDE * fall_H11 + k_BHD[..., None] * v_BHE[..., None, :]
    return (q_BHD[..., None, :] @ state_BHDE).squeeze(-2), state_BHDE


def decay_attention_reference(
    q_THD: Tensor, k_THD: Tensor, v_THE: Tensor, decay_H: Tensor, layout: Layout
) -> tuple[Tensor, Tensor]:
    """`decay_attention` token by token in float64: the definition that the scan is checked against."""
    q_THD, k_THD, v_THE, decay_H = (x.double() for x in (q_THD, k_THD, v_THE, decay_H))
    outputs: list[Tensor] = []
    states: list[Tensor] = []
    for segment, parent in enumerate(layout.parents):
        state_HDE = q_THD.new_zeros(*k_THD.shape[1:], v_THE.shape[2]) if parent < 0 else states[parent]
        for t in range(layout.starts[segment], layout.starts[segment + 1]):
            added_HDE = k_THD[t, :, :, None] * v_THE[t, :, None, :]
            state_HDE = torch.exp(-decay_H)[:, None, None] * state_HDE + added_HDE
            outputs.append(torch.einsum("hd,hde->he", q_THD[t], state_HDE))
        states.append(state_HDE)
    return torch.stack(outputs), torch.stack(states)


def _cut(lengths_S: Ints, chunk: int) -> tuple[Ints, Ints, Ints]:
    """Length, segment, and rank within its segment, of every chunk."""
    count_S = -(-lengths_S // chunk)
    segment_N = np.repeat(np.arange(len(lengths_S)), count_S)
    rank_N = np.arange(len(segment_N)) - np.repeat(np.cumsum(count_S) - count_S, count_S)
    return np.minimum(lengths_S[segment_N] - rank_N * chunk, chunk), segment_N, rank_N


def _first_levels(layout: Layout, chunk: int) -> Ints:
    """How many chunks stand before each segment's first one."""
    count_S = -(-layout.lengths // chunk)
    first_S = np.zeros(len(layout.parents), dtype=np.int64)
    for segment, parent in enumerate(layout.parents):
        if parent >= 0:
            first_S[segment] = first_S[parent] + count_S[parent]
    return first_S


def _levels(level_N: Ints, before_N: Ints) -> list[Ints]:
    """Split sorted chunks by level, and count their predecessors from the beginning of the level before."""
    bounds = [0, *(np.flatnonzero(np.diff(level_N)) + 1).tolist(), len(level_N)]
    later = [before_N[bounds[i] : bounds[i + 1]] - bounds[i - 1] for i in range(1, len(bounds) - 1)]
    return [np.arange(bounds[1]), *later]


def _by_chunk(x_THD: Tensor, index: ChunkIndex) -> Tensor:
    chunks, length = index.tokens_NC.shape
    x_NCHD: Tensor = _select(x_THD, index.tokens_NC.flatten()).unflatten(0, (chunks, length))
    return x_NCHD.transpose(1, 2).to(torch.promote_types(x_THD.dtype, torch.float32))


def _falloff(decay_H: Tensor, steps_NC: Tensor) -> Tensor:
    """exp(-s_h n), shape (N, H, C), and 0 for n < 0: growth is never computed, so nothing overflows."""
    steps_N1C = steps_NC[:, None, :]
    fall_NHC = torch.exp(-decay_H[:, None] * steps_N1C.clamp(min=0))
    return torch.where(steps_N1C < 0, 0.0, fall_NHC)


def _scan(added_NHDE: Tensor, through_NH11: Tensor, index: ChunkIndex, state_RHDE: Tensor | None) -> Tensor:
    """The state that each chunk starts from, (N, H, D, E)."""
    sizes = [len(continued) for continued in index.levels]
    # split, not slices: the backward of each slice would be a tensor as large as the whole
    added, through = added_NHDE.split(sizes), through_NH11.split(sizes)
    state = torch.zeros_like(added[0]) if state_RHDE is None else state_RHDE
    before = [state]
    for level, continued in enumerate(index.levels[1:]):
        state = _select(state * through[level] + added[level], continued)
        before.append(state)
    return torch.cat(before)


def _select(x: Tensor, index_N: Tensor) -> Tensor:
    """x[index]: its backward adds by index, where that of indexing sorts."""
    return x.index_select(0, index_N)
