"""Masks of ops/dropout.py, bit by bit the same, drawn where they are used.

A word is xor of a token's hash and of a column pair's hash, mixed once more; its low half draws for the even
column, its high half for the odd one.

Shapes: N = rows (tokens), D = features, W = ceil(D / 2).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorasmith.kernels.rows import part_of_row, rows_of, warps


def draw(
    tokens_N: Tensor,
    columns_W: Tensor,
    least: int,
    mixers: tuple[int, int],
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    """(N, width): ones, where a draw is `least` or more, and zeros.

    `tokens_N` and `columns_W` are int32 hashes, `mixers` the two odd multipliers of the last mixing.
    """
    out_ND = torch.empty(len(tokens_N), width, dtype=dtype, device=tokens_N.device)
    _launch(None, None, tokens_N, columns_W, least, mixers, out_ND)
    return out_ND


def drop(x: Tensor, tokens_N: Tensor, columns_W: Tensor, least: int, mixers: tuple[int, int]) -> Tensor:
    """x (N, D) with zeros where `draw` has them."""
    x_ND = rows_of(x)
    out_ND = torch.empty(x_ND.shape, dtype=x.dtype, device=x.device)
    _launch(x_ND, None, tokens_N, columns_W, least, mixers, out_ND)
    return out_ND


def add_dropped(
    sum_ND: Tensor, x_ND: Tensor, tokens_N: Tensor, columns_W: Tensor, least: int, mixers: tuple[int, int]
) -> None:
    """sum += drop(x), rounded once, in place; both contiguous."""
    _launch(rows_of(x_ND), sum_ND, tokens_N, columns_W, least, mixers, sum_ND)


def _launch(
    x_ND: Tensor | None,
    sum_ND: Tensor | None,
    tokens_N: Tensor,
    columns_W: Tensor,
    least: int,
    mixers: tuple[int, int],
    out_ND: Tensor,
) -> None:
    num_rows, width = out_ND.shape
    assert out_ND.is_contiguous()
    assert len(tokens_N) == num_rows, (len(tokens_N), num_rows)
    block = part_of_row(width)
    _drop[(num_rows, triton.cdiv(width, block))](
        *(x_ND, sum_ND, tokens_N, columns_W, out_ND, 0 if x_ND is None else x_ND.stride(0), width, least),
        FIRST=mixers[0],
        SECOND=mixers[1],
        BLOCK=block,
        num_warps=warps(block),
    )


@triton.jit
def _drop(
    x_ptr,
    sum_ptr,
    tokens_ptr,
    columns_ptr,
    out_ptr,
    x_stride,
    width,
    least,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = keep, keep * x, or sum + keep * x, by what is given."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    word = tl.load(columns_ptr + columns // 2, mask=inside, other=0) ^ tl.load(tokens_ptr + row)
    word *= FIRST
    word ^= word >> 15
    word *= SECOND
    value = ((word >> (columns % 2 * 16)).to(tl.int16) >= least).to(tl.float32)
    if x_ptr is not None:
        value *= tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0).to(tl.float32)
    if sum_ptr is not None:
        value += tl.load(sum_ptr + row * width + columns, mask=inside, other=0).to(tl.float32)
    tl.store(out_ptr + row * width + columns, value.to(out_ptr.dtype.element_ty), mask=inside)
