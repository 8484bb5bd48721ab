"""RMSNorm in one pass over its rows: the twin of ops/rms_norm.py.

Shapes: N = rows, D = features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorasmith.kernels.rows import rows_of, warps, whole_row

_ROWS_OF_PART, _COLUMNS_OF_PART = 256, 128
"""What one program sums of the weight's gradient."""


def forward(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """weight * x / sqrt(mean(x^2) + eps) in the wider dtype of both, and 1 / sqrt(...) (N,) in fp32."""
    x_ND, width = rows_of(x), x.shape[-1]
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight_D.dtype), device=x.device)
    rstd_N = torch.empty(len(x_ND), dtype=torch.float32, device=x.device)
    block = whole_row(width)
    _normalise[(len(x_ND),)](
        *(x_ND, weight_D.contiguous(), out, rstd_N, x_ND.stride(0), width, eps),
        BLOCK=block,
        num_warps=warps(block),
    )
    return out, rstd_N


def input_gradient(grad: Tensor, x: Tensor, weight_D: Tensor, rstd_N: Tensor) -> Tensor:
    """Of x, in its shape and dtype."""
    grad_ND, x_ND, width = rows_of(grad), rows_of(x), x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = whole_row(width)
    _differentiate[(len(x_ND),)](
        *(grad_ND, x_ND, weight_D.contiguous(), rstd_N, out, grad_ND.stride(0), x_ND.stride(0), width),
        BLOCK=block,
        num_warps=warps(block),
    )
    return out


def weight_gradient(grad: Tensor, x: Tensor, rstd_N: Tensor) -> Tensor:
    """Of the weight, (D,) in fp32; its sums are in one order, so they are the same in every run."""
    grad_ND, x_ND = rows_of(grad), rows_of(x)
    num_rows, width = x_ND.shape
    parts = triton.cdiv(num_rows, _ROWS_OF_PART)
    sums_PD = torch.empty(parts, width, dtype=torch.float32, device=x.device)
    _sum_over_rows[(triton.cdiv(width, _COLUMNS_OF_PART), parts)](
        *(grad_ND, x_ND, rstd_N, sums_PD, grad_ND.stride(0), x_ND.stride(0), num_rows, width),
        ROWS=_ROWS_OF_PART,
        STEP=16,
        COLUMNS=_COLUMNS_OF_PART,
    )
    return sums_PD.sum(0)


@triton.jit
def _normalise(x_ptr, weight_ptr, out_ptr, rstd_ptr, x_stride, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    normed = (x * rstd).to(x_ptr.dtype.element_ty).to(tl.float32)  # rounded before it is multiplied
    tl.store(rstd_ptr + row, rstd)
    tl.store(out_ptr + row * width + columns, (normed * weight).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _differentiate(
    grad_ptr, x_ptr, weight_ptr, rstd_ptr, out_ptr, grad_stride, x_stride, width, BLOCK: tl.constexpr
):
    """rstd * (gw - x * rstd^2 * mean(gw * x)) with gw = grad * weight."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    grad = tl.load(grad_ptr + row * grad_stride + columns, mask=inside, other=0).to(tl.float32)
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0).to(tl.float32)
    rstd = tl.load(rstd_ptr + row)
    gw = grad * weight
    along = tl.sum(gw * x, 0) * rstd * rstd / width
    out = rstd * (gw - x * along)
    tl.store(out_ptr + row * width + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _sum_over_rows(
    grad_ptr,
    x_ptr,
    rstd_ptr,
    sums_ptr,
    grad_stride,
    x_stride,
    num_rows,
    width,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Of grad * (x * rstd), for ROWS rows and COLUMNS columns."""
    part = tl.program_id(1)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, ROWS, STEP):
        rows = (part * ROWS + start + tl.arange(0, STEP)).to(tl.int64)
        inside = (rows[:, None] < num_rows) & (columns[None, :] < width)
        grad = tl.load(grad_ptr + rows[:, None] * grad_stride + columns[None, :], mask=inside, other=0)
        x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0)
        normed = (x.to(tl.float32) * rstd[:, None]).to(x_ptr.dtype.element_ty).to(tl.float32)
        total += tl.sum(normed * grad.to(tl.float32), 0)
    tl.store(sums_ptr + part * width + columns, total, mask=columns < width)
