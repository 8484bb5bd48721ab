"""Rows to fp8 codes in one launch: the twin of `quantise_rows` in ops/fp8.py.

Shapes: N = rows, K = elements of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorasmith.kernels.rows import part_of_row, rows_of, warps


def quantise_rows(
    x: Tensor, factor_K: Tensor | None, largest: float, least_scale: float
) -> tuple[Tensor, Tensor]:
    """x (N, K) * factor as e4m3 codes (N, K) of at most `largest`, and their fp32 scales (N, 1)."""
    x_NK = rows_of(x)
    num_rows, width = x_NK.shape
    codes_NK = torch.empty(num_rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    scales_N1 = torch.empty(num_rows, 1, dtype=torch.float32, device=x.device)
    block = part_of_row(width, at_most=4096)
    _quantise[(num_rows,)](
        *(x_NK, factor_K, codes_NK, scales_N1, x_NK.stride(0), width, largest, least_scale),
        BLOCK=block,
        num_warps=warps(block),
    )
    return codes_NK, scales_N1


@triton.jit
def _quantise(
    x_ptr, factor_ptr, codes_ptr, scales_ptr, x_stride, width, largest, least_scale, BLOCK: tl.constexpr
):
    """A row is read for its largest value, and once more, from cache, to be divided."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    parts = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        sizes = tl.abs(_values(x_ptr, factor_ptr, at, width))
        parts = tl.maximum(parts, sizes, propagate_nan=tl.PropagateNan.ALL)
    # tl.max passes over NaN: one is put where it stays
    is_nan = tl.max((parts != parts).to(tl.int32), 0) > 0
    scale = tl.maximum(tl.div_rn(tl.max(parts, 0), largest), least_scale)
    scale = tl.where(is_nan, float("nan"), scale)
    tl.store(scales_ptr + row, scale)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        codes = tl.div_rn(_values(x_ptr, factor_ptr, at, width), tl.zeros((BLOCK,), tl.float32) + scale)
        codes = tl.minimum(tl.maximum(codes, -largest), largest)
        tl.store(codes_ptr + row * width + at, codes.to(tl.float8e4nv), mask=at < width)


@triton.jit
def _values(x_ptr, factor_ptr, at, width):
    values = tl.load(x_ptr + at, mask=at < width, other=0).to(tl.float32)
    if factor_ptr is not None:
        values *= tl.load(factor_ptr + at, mask=at < width, other=0)
    return values
