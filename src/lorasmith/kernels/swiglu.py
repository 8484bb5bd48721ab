"""silu(gate) * up in one pass each way: the twin of ops/swiglu.py.

Shapes: F = features between the projections.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorasmith.kernels.rows import part_of_row, rows_of, warps


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """(..., F) both, of one dtype -> (..., F); silu is rounded before it is multiplied."""
    gate_NF, up_NF, width = rows_of(gate), rows_of(up), gate.shape[-1]
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    block = part_of_row(width)
    _multiply[(len(gate_NF), triton.cdiv(width, block))](
        *(gate_NF, up_NF, out, gate_NF.stride(0), up_NF.stride(0), width),
        BLOCK=block,
        num_warps=warps(block),
    )
    return out


def gradients(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Of gate and of up, in their shape and dtype."""
    grad_NF, gate_NF, up_NF, width = rows_of(grad), rows_of(gate), rows_of(up), gate.shape[-1]
    grad_gate, grad_up = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (gate, up))
    block = part_of_row(width)
    _differentiate[(len(gate_NF), triton.cdiv(width, block))](
        *(grad_NF, gate_NF, up_NF, grad_gate, grad_up),
        *(grad_NF.stride(0), gate_NF.stride(0), up_NF.stride(0), width),
        BLOCK=block,
        num_warps=warps(block),
    )
    return grad_gate, grad_up


@triton.jit
def _multiply(gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=inside, other=0).to(tl.float32)
    silu = (gate * tl.sigmoid(gate)).to(gate_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * width + columns, (silu * up).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _differentiate(
    grad_ptr,
    gate_ptr,
    up_ptr,
    grad_gate_ptr,
    grad_up_ptr,
    grad_stride,
    gate_stride,
    up_stride,
    width,
    BLOCK: tl.constexpr,
):
    """silu' = s + g s (1 - s) with s = sigmoid(g); first factors are rounded as in the forward pass."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    grad = tl.load(grad_ptr + row * grad_stride + columns, mask=inside, other=0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=inside, other=0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = (gate * sigmoid).to(gate_ptr.dtype.element_ty).to(tl.float32)
    through = (grad * up).to(gate_ptr.dtype.element_ty).to(tl.float32)
    slope = sigmoid * (1 + gate * (1 - sigmoid))
    out = row * width + columns
    tl.store(grad_up_ptr + out, (silu * grad).to(grad_up_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_gate_ptr + out, (through * slope).to(grad_gate_ptr.dtype.element_ty), mask=inside)
