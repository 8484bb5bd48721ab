"""The softmax part of one tile of logits: the twin of the inner loop of ops/cross_entropy.py.

Matrix products stay cuBLAS's; between them a tile is read for its maximum and sum, and once more to become
what the product with the head takes.

Shapes: N = rows, C = columns of the tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorasmith.kernels.rows import part_of_row, warps


def read_tile(
    logits_NC: Tensor,
    scale_C: Tensor | None,
    bias_C: Tensor | None,
    columns_N: Tensor,
    running: tuple[Tensor, Tensor, Tensor],
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """Takes logits * scale + bias into the running maximum, sum of exponentials and label's logit.

    `columns_N` are the labels counted from the tile's first column; a label inside it is told apart and left
    out of maximum and sum. `running` are three (N, 1) tensors in fp32, changed in place.

    Returns: exp(old maximum - new one) (N, 1), by which what was summed before shrinks; and in `dtype`
    exp(logit - maximum) * scale (N, C), 0 at a label; None without a dtype.
    """
    num_rows, columns = logits_NC.shape
    shrink_N1 = torch.empty_like(running[0])
    out_NC = None if dtype is None else torch.empty(num_rows, columns, dtype=dtype, device=logits_NC.device)
    block = part_of_row(columns, at_most=4096)
    _read[(num_rows,)](
        *(logits_NC.contiguous(), scale_C, bias_C, columns_N, *running, shrink_N1, out_NC, columns),
        BLOCK=block,
        num_warps=warps(block),
    )
    return shrink_N1, out_NC


@triton.jit
def _read(
    logits_ptr,
    scale_ptr,
    bias_ptr,
    label_columns_ptr,
    top_ptr,
    sum_ptr,
    label_logit_ptr,
    shrink_ptr,
    out_ptr,
    columns,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    own = tl.load(label_columns_ptr + row)
    before = tl.load(top_ptr + row)
    logits_ptr += row * columns
    top, total, label_logit = before, tl.load(sum_ptr + row), 0.0
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = _logits(logits_ptr, scale_ptr, bias_ptr, at, columns)
        label_logit += tl.sum(tl.where(at == own, values, 0.0), 0)
        values = tl.where(at == own, float("-inf"), values)
        higher = tl.maximum(top, tl.max(values, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(values - higher), 0)
        top = higher
    tl.store(top_ptr + row, top)
    tl.store(sum_ptr + row, total)
    tl.store(shrink_ptr + row, tl.exp(before - top))
    tl.store(label_logit_ptr + row, label_logit, mask=(own >= 0) & (own < columns))
    if out_ptr is not None:
        for start in range(0, columns, BLOCK):
            at = start + tl.arange(0, BLOCK)
            values = _logits(logits_ptr, scale_ptr, bias_ptr, at, columns)
            out = tl.exp(tl.where(at == own, float("-inf"), values) - top)
            if scale_ptr is not None:
                out *= tl.load(scale_ptr + at, mask=at < columns, other=0).to(tl.float32)
            tl.store(out_ptr + row * columns + at, out.to(out_ptr.dtype.element_ty), mask=at < columns)


@triton.jit
def _logits(logits_ptr, scale_ptr, bias_ptr, at, columns):
    """Minus infinity behind the tile's last column."""
    values = tl.load(logits_ptr + at, mask=at < columns, other=0)
    if scale_ptr is not None:
        values *= tl.load(scale_ptr + at, mask=at < columns, other=0).to(tl.float32)
    if bias_ptr is not None:
        values += tl.load(bias_ptr + at, mask=at < columns, other=0).to(tl.float32)
    return tl.where(at < columns, values, float("-inf"))
