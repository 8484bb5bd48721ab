"""Linear attention with a decay per head: o_i = sum_{j <= i} exp(-s_h (i - j)) (q_i . k_j) v_j.

There is no softmax, no scale and no denominator, so the past of a token is one matrix per head, the state
S_i = exp(-s_h) S_{i-1} + k_i v_i', and o_i = q_i S_i. The scan cuts every segment into chunks of C tokens:
inside a chunk the sum is written out (C x C), between chunks only the state is handed on. Chunks that stand
equally far from the beginning of their conversations form a level and are computed together. Memory is O(T).
The backward is written by hand: the same products, and the same scan from the last level to the first.

Shapes: B = rows of a batch, T = tokens of a flat row, H = heads, D = size of q and k, E = size of v,
N = chunks, C = tokens of a chunk, S = segments, R = roots (segments without a parent).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorasmith.ops.transfer import on_device
from lorasmith.types import Ints, Layout

CHUNK = 64
"""Tokens of a chunk of a long row. Scores cost C per token and states D * E / C."""
_CHUNKS = (32, CHUNK)
"""Those that a Layout may be cut by: short segments would be padding for the most part."""
_NUMBERS = 1 << 18
"""Numbers of each intermediate of one matmul: 1 MiB in fp32."""


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


def chunk_index(layout: Layout, device: torch.device | str = "cpu", chunk: int | None = None) -> ChunkIndex:
    """Segments must not be empty, parents stand before their children; `chunk` is the cheapest by default."""
    chunk = min(_CHUNKS, key=lambda length: _cost(layout, length)) if chunk is None else chunk
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
        tokens_NC=on_device(tokens_NC[order_N], device),
        lengths_N=on_device(lengths_N[order_N], device),
        slots_T=on_device(slots_NC[inside_NC], device),
        levels=on_device(np.concatenate(levels), device).split([len(level) for level in levels]),
        last_S=on_device(place_N[last_S], device),
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

    `decay_H` is s_h >= 0, and not trained; `state_RHDE` is what the roots start from, zero by default.
    Products, decays and states are fp32 for fp16 and bf16 inputs. Returns the outputs (T, H, E), in fp32 or
    the inputs' own larger dtype, and the state at the end of each segment (S, H, D, E).

    For its backward it keeps its inputs only: scores and states, some five times as large, are made again.
    """
    assert not decay_H.requires_grad, "the decay is a constant"
    q_THD, k_THD, v_THE = (x.contiguous() for x in (q_THD, k_THD, v_THE))
    out: tuple[Tensor, Tensor] = _DecayAttention.apply(  # type: ignore[no-untyped-call]
        q_THD, k_THD, v_THE, decay_H, index, state_RHDE
    )
    return out


class _DecayAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_THD: Tensor,
        k_THD: Tensor,
        v_THE: Tensor,
        decay_H: Tensor,
        index: ChunkIndex,
        state_RHDE: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q_THD, k_THD, v_THE, decay_H, state_RHDE)
        ctx.index = index
        ctx.set_materialize_grads(False)
        fall = _falloffs(decay_H, index, _wide(q_THD))
        before_NHDE, end_NHDE = _scan(k_THD, v_THE, fall, index, state_RHDE)
        out_NHCE = _by_chunk_like(v_THE, index)
        for part in _parts(index, v_THE):
            q, k, v = (_chunks(x, index, part) for x in (q_THD, k_THD, v_THE))
            scores = torch.matmul(q, k.transpose(2, 3)).mul_(fall.between_HCC)
            out = out_NHCE[part].flatten(0, 1)
            torch.bmm(scores.flatten(0, 1), v.flatten(0, 1), out=out)
            out.baddbmm_(q.mul_(fall.from_start_HC1).flatten(0, 1), before_NHDE[part].flatten(0, 1))
        return _tokens(out_NHCE, index), _select(end_NHDE, index.last_S)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        q_THD, k_THD, v_THE, decay_H, state_RHDE = ctx.saved_tensors
        index, (d_out, d_end) = ctx.index, gradients
        d_out = torch.zeros_like(v_THE) if d_out is None else d_out.contiguous()
        fall = _falloffs(decay_H, index, _wide(q_THD))
        before_NHDE, d_end_NHDE = _scan(k_THD, v_THE, fall, index, state_RHDE)
        dq, dk, dv = (_by_chunk_like(x, index) for x in (q_THD, k_THD, v_THE))
        d_before_NHDE = torch.empty_like(before_NHDE)
        for part in _parts(index, v_THE):
            of_tokens = (_chunks(x, index, part) for x in (q_THD, k_THD, v_THE, d_out))
            q, k, v, g = (x.flatten(0, 1) for x in of_tokens)
            g.view(-1, *dv.shape[1:]).mul_(fall.real_N1C1[part])
            of_outputs = (x[part].flatten(0, 1) for x in (dq, dk, dv, before_NHDE, d_before_NHDE))
            _within_backward((q, k, v, g), tuple(of_outputs), fall)
        _scan_backward(d_before_NHDE, d_end_NHDE.zero_(), d_end, fall, index)
        for part in _parts(index, v_THE):
            k, v = (_chunks(x, index, part).mul_(fall.to_end_NHC1[part]) for x in (k_THD, v_THE))
            d_added = d_end_NHDE[part].flatten(0, 1)
            dk[part].flatten(0, 1).baddbmm_(v.flatten(0, 1), d_added.transpose(1, 2))
            dv[part].flatten(0, 1).baddbmm_(k.flatten(0, 1), d_added)
        d_inputs = (_tokens(d, index).to(x.dtype) for d, x in ((dq, q_THD), (dk, k_THD), (dv, v_THE)))
        d_state = None if state_RHDE is None else d_before_NHDE[: len(state_RHDE)].to(state_RHDE.dtype)
        return (*d_inputs, None, None, d_state)


def _within_backward(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor], outputs: tuple[Tensor, ...], fall: _Falloffs
) -> None:
    """What reaches q, k, v and the state before the chunk through the chunk's own outputs.

    Shapes: (N H, C or D, D or E). `inputs` are q, k, v and the outputs' gradient, which is scaled in place.
    """
    q, k, v, g = inputs
    dq, dk, dv, before, d_before = outputs
    between_HCC, from_start_HC1 = fall.between_HCC, fall.from_start_HC1
    scores, d_scores = (
        torch.bmm(x, y.transpose(1, 2)).view(-1, *between_HCC.shape).mul_(between_HCC).flatten(0, 1)
        for x, y in ((q, k), (g, v))
    )
    torch.bmm(scores.transpose(1, 2), g, out=dv)
    torch.bmm(d_scores.transpose(1, 2), q, out=dk)
    torch.bmm(d_scores, k, out=dq)
    g.view(-1, len(from_start_HC1), *g.shape[1:]).mul_(from_start_HC1)
    dq.baddbmm_(g, before.transpose(1, 2))
    torch.bmm(q.transpose(1, 2), g, out=d_before)


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


def _cost(layout: Layout, chunk: int) -> int:
    """Products inside chunks and with states, and the traffic of a state, for heads of about 96."""
    chunks = int((-(-layout.lengths // chunk)).sum())
    return chunks * (chunk * (chunk + 96) + 4096)


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


@dataclass(frozen=True)
class _Falloffs:
    """exp(-s_h n) for the distances n of a scan."""

    between_HCC: Tensor
    """From key to query, 0 for keys in the future."""
    from_start_HC1: Tensor
    """From the state before the chunk to each token."""
    to_end_NHC1: Tensor
    """From each token to the end of the chunk, 0 for padding."""
    through_NH11: Tensor
    """From the state before the chunk to that after it."""
    real_N1C1: Tensor
    """0 for padding."""


def _falloffs(decay_H: Tensor, index: ChunkIndex, dtype: torch.dtype) -> _Falloffs:
    decay_H = decay_H.to(dtype)
    steps_C = torch.arange(1, index.tokens_NC.shape[1] + 1, device=decay_H.device)
    left_NC = index.lengths_N[:, None] - steps_C
    return _Falloffs(
        between_HCC=_falloff(decay_H, steps_C[:, None] - steps_C).transpose(0, 1).contiguous(),
        from_start_HC1=_falloff(decay_H, steps_C[None])[0, ..., None],
        to_end_NHC1=_falloff(decay_H, left_NC)[..., None],
        through_NH11=_falloff(decay_H, index.lengths_N[:, None])[..., None],
        real_N1C1=(left_NC >= 0)[:, None, :, None],
    )


def _falloff(decay_H: Tensor, steps_NC: Tensor) -> Tensor:
    """exp(-s_h n), shape (N, H, C), and 0 for n < 0: growth is never computed, so nothing overflows."""
    steps_N1C = steps_NC[:, None, :]
    fall_NHC = torch.exp(-decay_H[:, None] * steps_N1C.clamp(min=0))
    return torch.where(steps_N1C < 0, 0.0, fall_NHC)


def _scan(
    k_THD: Tensor, v_THE: Tensor, fall: _Falloffs, index: ChunkIndex, state_RHDE: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The states that each chunk starts from and ends with, (N, H, D, E)."""
    shape = (len(index.tokens_NC), *k_THD.shape[1:], v_THE.shape[2])
    before, end = (torch.empty(shape, dtype=_wide(k_THD), device=k_THD.device) for _ in range(2))
    for last, here, continued in _levels_of(index):
        if last is None:
            before[here] = 0.0 if state_RHDE is None else state_RHDE
        else:
            torch.index_select(end[last], 0, continued, out=before[here])
        torch.mul(before[here], fall.through_NH11[here], out=end[here])
        k = _chunks(k_THD, index, here).mul_(fall.to_end_NHC1[here])
        added = (k.transpose(2, 3).flatten(0, 1), _chunks(v_THE, index, here).flatten(0, 1))
        end[here].flatten(0, 1).baddbmm_(*added)
    return before, end


def _scan_backward(
    d_before: Tensor, d_end: Tensor, d_end_SHDE: Tensor | None, fall: _Falloffs, index: ChunkIndex
) -> None:
    """`d_before` comes with what the chunks' outputs ask, `d_end` with zeros; both leave complete."""
    if d_end_SHDE is not None:
        d_end.index_add_(0, index.last_S, d_end_SHDE)
    for last, here, continued in reversed(list(_levels_of(index))):
        d_before[here].addcmul_(d_end[here], fall.through_NH11[here])
        if last is not None:
            d_end[last].index_add_(0, continued, d_before[here])


def _levels_of(index: ChunkIndex) -> Iterator[tuple[slice | None, slice, Tensor]]:
    """For each level: the one before, itself, and which chunks of the one before its own continue."""
    last, start = None, 0
    for continued in index.levels:
        here = slice(start, start + len(continued))
        yield last, here, continued
        last, start = here, here.stop


def _parts(index: ChunkIndex, x_THE: Tensor) -> Iterator[slice]:
    """Chunks whose intermediates stay in cache together."""
    chunks, length = index.tokens_NC.shape
    step = max(1, _NUMBERS // (length * x_THE.shape[1] * max(length, x_THE.shape[2])))
    return (slice(first, first + step) for first in range(0, chunks, step))


def _chunks(x_THD: Tensor, index: ChunkIndex, part: slice) -> Tensor:
    """Some chunks' tokens, (N, H, C, D), in the dtype of the products: a copy, free to be written to."""
    heads, tokens_NC = x_THD.shape[1], index.tokens_NC[part]
    numbers_H1 = torch.arange(heads, device=x_THD.device)[:, None]
    rows_NHC = tokens_NC[:, None] * heads + numbers_H1
    taken = _select(x_THD.flatten(0, 1), rows_NHC.flatten())
    return taken.to(_wide(x_THD)).view(*rows_NHC.shape, x_THD.shape[2])


def _tokens(x_NHCE: Tensor, index: ChunkIndex) -> Tensor:
    """The inverse of `_chunks`: (T, H, E)."""
    _, heads, length, size = x_NHCE.shape
    numbers_H = torch.arange(heads, device=x_NHCE.device) * length
    slots_T1 = (index.slots_T + index.slots_T // length * (heads - 1) * length)[:, None]
    return _select(x_NHCE.view(-1, size), (slots_T1 + numbers_H).flatten()).view(-1, heads, size)


def _by_chunk_like(x_THD: Tensor, index: ChunkIndex) -> Tensor:
    chunks, length = index.tokens_NC.shape
    return x_THD.new_empty((chunks, x_THD.shape[1], length, x_THD.shape[2]), dtype=_wide(x_THD))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _select(x: Tensor, index_N: Tensor) -> Tensor:
    return x.index_select(0, index_N)
