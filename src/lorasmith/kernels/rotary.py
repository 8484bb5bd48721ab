"""Rotary embedding of queries and keys in one launch: the twin of attention/rotary.py.

Shapes: B = rows of a batch, H = query heads, K = key heads, T = tokens, D = head size,
R = features that turn.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_HEADS = 8
"""Of one program."""


def turn(
    q_BHTD: Tensor, k_BKTD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, *, interleaved: bool, backward: bool
) -> tuple[Tensor, Tensor]:
    """Both turned by their angles, or back (the transposed matrix), each in memory order (B, T, H, D).

    Shapes: cos and sin (1 or B, T, R), of which an interleaved pairing reads the first half.
    """
    batch, num_heads, tokens, size = q_BHTD.shape
    num_key_heads, turning = k_BKTD.shape[1], cos_BTR.shape[-1]
    cos_BTR, sin_BTR = (x if x.stride(2) == 1 else x.contiguous() for x in (cos_BTR, sin_BTR))
    outs = tuple(_empty_like_projection(x) for x in (q_BHTD, k_BKTD))
    blocks = triton.cdiv(num_heads, _HEADS)
    _turn[(batch * tokens, blocks + triton.cdiv(num_key_heads, _HEADS))](
        *(q_BHTD, k_BKTD, *outs, cos_BTR, sin_BTR, tokens, num_heads, num_key_heads),
        *(*q_BHTD.stride(), *k_BKTD.stride(), *_row_strides(cos_BTR), *_row_strides(sin_BTR)),
        BLOCKS=blocks,
        HEADS=_HEADS,
        SIZE=size,
        TURNING=turning,
        INTERLEAVED=interleaved,
        BACKWARD=backward,
        PAIRS=triton.next_power_of_2(turning // 2),
        REST=triton.next_power_of_2(max(size - turning, 1)),
        num_warps=2,
    )
    return outs[0], outs[1]


def _empty_like_projection(x_BHTD: Tensor) -> Tensor:
    batch, heads, tokens, size = x_BHTD.shape
    return torch.empty(batch, tokens, heads, size, dtype=x_BHTD.dtype, device=x_BHTD.device).transpose(1, 2)


def _row_strides(angles_BTR: Tensor) -> tuple[int, int]:
    """Of batch and token; angles of one row serve the whole batch."""
    return (angles_BTR.stride(0) if len(angles_BTR) > 1 else 0), angles_BTR.stride(1)


# fmt: off
@triton.jit
def _turn(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, tokens, num_heads, num_key_heads,
    q_batch, q_head, q_token, q_feature, k_batch, k_head, k_token, k_feature,
    cos_batch, cos_token, sin_batch, sin_token,
    BLOCKS: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr, TURNING: tl.constexpr,
    INTERLEAVED: tl.constexpr, BACKWARD: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):
    """One token of a few heads: the first BLOCKS programs of a token turn queries, the others keys."""
    flat = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    row, token = flat // tokens, flat % tokens
    cos_ptr += row * cos_batch + token * cos_token
    sin_ptr += row * sin_batch + token * sin_token
    if block < BLOCKS:
        _turn_heads(
            q_ptr + row * q_batch + token * q_token, q_out_ptr + flat * num_heads * SIZE,
            cos_ptr, sin_ptr,
            block * HEADS + tl.arange(0, HEADS), num_heads, q_head, q_feature,
            SIZE, TURNING, INTERLEAVED, BACKWARD, PAIRS, REST,
        )
    else:
        _turn_heads(
            k_ptr + row * k_batch + token * k_token, k_out_ptr + flat * num_key_heads * SIZE,
            cos_ptr, sin_ptr,
            (block - BLOCKS) * HEADS + tl.arange(0, HEADS), num_key_heads, k_head, k_feature,
            SIZE, TURNING, INTERLEAVED, BACKWARD, PAIRS, REST,
        )
# fmt: on


@triton.jit
def _turn_heads(
    x_ptr,
    out_ptr,
    cos_ptr,
    sin_ptr,
    heads,
    num_heads,
    head_stride,
    feature_stride,
    SIZE: tl.constexpr,
    TURNING: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BACKWARD: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
):
    HALF: tl.constexpr = TURNING // 2
    pairs = tl.arange(0, PAIRS)
    known = pairs < HALF
    first = pairs * 2 if INTERLEAVED else pairs
    second = first + 1 if INTERLEAVED else pairs + HALF
    again = pairs if INTERLEAVED else second  # the angle of the second feature
    cos_1 = tl.load(cos_ptr + pairs, mask=known, other=0).to(tl.float32)[None, :]
    cos_2 = tl.load(cos_ptr + again, mask=known, other=0).to(tl.float32)[None, :]
    sin_1 = tl.load(sin_ptr + pairs, mask=known, other=0).to(tl.float32)[None, :]
    sin_2 = tl.load(sin_ptr + again, mask=known, other=0).to(tl.float32)[None, :]
    inside = (heads[:, None] < num_heads) & known[None, :]
    x_rows, out_rows = x_ptr + heads[:, None] * head_stride, out_ptr + heads[:, None] * SIZE
    x_1 = tl.load(x_rows + first[None, :] * feature_stride, mask=inside, other=0).to(tl.float32)
    x_2 = tl.load(x_rows + second[None, :] * feature_stride, mask=inside, other=0).to(tl.float32)
    if BACKWARD:
        y_1, y_2 = x_1 * cos_1 + x_2 * sin_2, x_2 * cos_2 - x_1 * sin_1
    else:
        y_1, y_2 = x_1 * cos_1 - x_2 * sin_1, x_2 * cos_2 + x_1 * sin_2
    tl.store(out_rows + first[None, :], y_1.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_rows + second[None, :], y_2.to(out_ptr.dtype.element_ty), mask=inside)
    if TURNING < SIZE:
        rest = TURNING + tl.arange(0, REST)
        beyond = (heads[:, None] < num_heads) & (rest[None, :] < SIZE)
        kept = tl.load(x_rows + rest[None, :] * feature_stride, mask=beyond, other=0)
        tl.store(out_rows + rest[None, :], kept, mask=beyond)
