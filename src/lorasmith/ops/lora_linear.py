"""A frozen linear layer and its LoRA branch as one differentiable function.

y = x W^T + bias + s (drop(x) A^T) B^T. It keeps x and drop(x) A^T for backward and nothing else: the dropout
mask is drawn again, a block of rows at a time, and the gradient of x is made in one buffer.

Shapes: N = rows (tokens), D = input features, O = output features, R = rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorasmith.kernels.twins import triton_twin
from lorasmith.ops.dropout import DropoutMask, MaskRows, dropout, mask_hashes
from lorasmith.ops.gemm import linear
from lorasmith.ops.rms_norm import Normed
from lorasmith.ops.swiglu import swiglu_gradients, swiglu_value

_BLOCK = 1 << 20
"""Elements of x in a block: enough to keep every thread busy, few enough to stay in cache."""


def lora_linear(
    x: Tensor,
    w_OD: Tensor,
    bias_O: Tensor | None,
    a_RD: Tensor,
    b_OR: Tensor,
    scaling: float,
    mask: DropoutMask | None = None,
    normed: Normed | None = None,
) -> Tensor:
    """x (..., D) -> (..., O). Gradients for x, A and B; W and the bias are frozen.

    The branch is computed in x's dtype, which is W's; A and B may be wider (fp32 masters over a bf16 base)
    and their gradients come out in their own dtype. Where x was `normed`, the backward makes it again from
    what the norm keeps anyway.
    """
    if not torch.is_grad_enabled():  # a token of generation would spend a third of its time in autograd
        return _forward(x, w_OD, bias_O, a_RD, b_OR, scaling, mask)[0]
    operands = (w_OD, bias_O, a_RD, b_OR, scaling, mask, normed)
    y: Tensor = _LoraLinear.apply(*operands, x)  # type: ignore[no-untyped-call]
    return y


def lora_linear_reference(
    x: Tensor,
    w_OD: Tensor,
    bias_O: Tensor | None,
    a_RD: Tensor,
    b_OR: Tensor,
    scaling: float,
    mask: DropoutMask | None = None,
) -> Tensor:
    """The same by autograd, as the formula reads."""
    dropped = x if mask is None else dropout(x, mask)
    return torch.nn.functional.linear(x, w_OD, bias_O) + scaling * (dropped @ a_RD.mT @ b_OR.mT)


def swiglu_lora_linear(
    gate: Tensor,
    up: Tensor,
    w_OD: Tensor,
    bias_O: Tensor | None,
    a_RD: Tensor,
    b_OR: Tensor,
    scaling: float,
    mask: DropoutMask | None = None,
) -> Tensor:
    """`lora_linear` of swiglu(gate, up), a feed-forward's way down.

    Shapes: gate and up (..., D), both of W's dtype -> (..., O).

    It keeps gate and up, from which the backward makes the product again: with both functions apart a third
    array of their size would be kept.
    """
    if not torch.is_grad_enabled():
        return _forward(swiglu_value(gate, up), w_OD, bias_O, a_RD, b_OR, scaling, mask)[0]
    operands = (w_OD, bias_O, a_RD, b_OR, scaling, mask, None)
    y: Tensor = _LoraLinear.apply(*operands, gate, up)  # type: ignore[no-untyped-call]
    return y


class _LoraLinear(torch.autograd.Function):
    """Its inputs are x, or the gate and up of which x is the SwiGLU."""

    @staticmethod
    def forward(
        ctx: Any,
        w_OD: Tensor,
        bias_O: Tensor | None,
        a_RD: Tensor,
        b_OR: Tensor,
        scaling: float,
        mask: DropoutMask | None,
        normed: Normed | None,
        *inputs: Tensor,
    ) -> Tensor:
        x = _entering(inputs)
        y, low_NR = _forward(x, w_OD, bias_O, a_RD, b_OR, scaling, mask)
        kept = inputs if normed is None else (normed.x_TD, normed.weight_D, normed.rstd)
        ctx.save_for_backward(low_NR, w_OD, a_RD, b_OR, *kept)
        ctx.mask, ctx.scale, ctx.remade = mask, _scale(scaling, mask), None
        if normed is not None:
            ctx.remade = normed.remade
            ctx.remade.users += 1
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        low_NR, w_OD, a_RD, b_OR, *kept = ctx.saved_tensors
        _, _, needs_a, needs_b, _, _, _, *needs_inputs = ctx.needs_input_grad
        x = _entering(kept) if ctx.remade is None else ctx.remade.take(*kept)
        needs = any(needs_inputs), needs_a, needs_b
        dx, da_RD, db_OR = _gradients(
            dy, x, low_NR, w_OD, a_RD, b_OR, scale=ctx.scale, mask=ctx.mask, needs=needs
        )
        dinputs: Sequence[Tensor | None] = (dx,)
        if len(needs_inputs) == 2:
            gate, up = kept
            dinputs = (None, None) if dx is None else swiglu_gradients(dx, gate, up, needs_inputs)
        return None, None, da_RD, db_OR, None, None, None, *dinputs


def _entering(inputs: Sequence[Tensor]) -> Tensor:
    """x itself, or the SwiGLU of gate and up."""
    return inputs[0] if len(inputs) == 1 else swiglu_value(*inputs)


def _forward(
    x: Tensor,
    w_OD: Tensor,
    bias_O: Tensor | None,
    a_RD: Tensor,
    b_OR: Tensor,
    scaling: float,
    mask: DropoutMask | None,
) -> tuple[Tensor, Tensor]:
    """y (..., O), and drop(x) A^T (N, R) before any scale."""
    x_ND = x.reshape(-1, x.shape[-1])
    low_NR = _down(x_ND, a_RD.to(x.dtype), mask)
    y_NO = linear(x_ND, w_OD, bias_O)
    y_NO.addmm_(low_NR, b_OR.to(x.dtype).t(), alpha=_scale(scaling, mask))
    return y_NO.view(*x.shape[:-1], len(w_OD)), low_NR


def _gradients(
    dy: Tensor,
    x: Tensor,
    low_NR: Tensor,
    w_OD: Tensor,
    a_RD: Tensor,
    b_OR: Tensor,
    *,
    scale: float,
    mask: DropoutMask | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of x, A and B that are needed."""
    x_ND, dy_NO = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]).contiguous()
    db_OR = (low_NR.t() @ dy_NO).t().to(b_OR.dtype).mul_(scale) if needs[2] else None
    dx_ND = linear(dy_NO, w_OD.t()) if needs[0] else None
    da_RD = torch.zeros_like(a_RD) if needs[1] else None
    dlow_NR = linear(dy_NO, b_OR.to(dy.dtype).t()).mul_(scale)
    _up(dlow_NR, x_ND, a_RD.to(x.dtype), mask, dx_ND, da_RD)
    return dx_ND if dx_ND is None else dx_ND.view(x.shape), da_RD, db_OR


def _scale(scaling: float, mask: DropoutMask | None) -> float:
    return scaling if mask is None else scaling * mask.scale


def _down(x_ND: Tensor, a_RD: Tensor, mask: DropoutMask | None) -> Tensor:
    """(x with zeros in it) A^T, (N, R): what is dropped is never stored whole."""
    if mask is None:
        return linear(x_ND, a_RD)
    if twin := triton_twin("dropout", x_ND):  # whole: on a GPU blocks cost launches, and x is soon read
        return linear(twin.drop(x_ND, *mask_hashes(mask, x_ND.shape[1])), a_RD)
    low_NR = x_ND.new_empty(len(x_ND), len(a_RD))
    for rows, factor in _blocks(mask, x_ND):
        low_NR[rows] = linear(factor.mul_(x_ND[rows]), a_RD)
    return low_NR


def _up(
    dlow_NR: Tensor,
    x_ND: Tensor,
    a_RD: Tensor,
    mask: DropoutMask | None,
    dx_ND: Tensor | None,
    da_RD: Tensor | None,
) -> None:
    """Add the branch's part to the gradient of x, and fill that of A, where they are wanted."""
    if mask is None:
        if dx_ND is not None:
            dx_ND.addmm_(dlow_NR, a_RD)
        if da_RD is not None:
            _add_product(da_RD, dlow_NR.t(), x_ND)
        return
    if twin := triton_twin("dropout", x_ND):
        hashes = mask_hashes(mask, x_ND.shape[1])
        if dx_ND is not None:
            twin.add_dropped(dx_ND, dlow_NR @ a_RD, *hashes)
        if da_RD is not None:
            _add_product(da_RD, dlow_NR.t(), twin.drop(x_ND, *hashes))
        return
    for rows, factor in _blocks(mask, x_ND):
        if dx_ND is not None:
            dx_ND[rows].addcmul_(dlow_NR[rows] @ a_RD, factor)
        if da_RD is not None:
            _add_product(da_RD, dlow_NR[rows].t(), factor.mul_(x_ND[rows]))


def _blocks(mask: DropoutMask, x_ND: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the rows, each with its ones and zeros, which the caller may overwrite."""
    num_rows, width = x_ND.shape
    assert len(mask.tokens_T) == num_rows, (len(mask.tokens_T), num_rows)
    elements = _BLOCK if x_ND.device.type == "cpu" else 16 * _BLOCK  # a GPU has no use for small pieces
    block = max(1, min(num_rows, elements // width))
    drawn = MaskRows(mask, width, x_ND.dtype, block=block)
    for start in range(0, num_rows, block):
        stop = min(start + block, num_rows)
        yield slice(start, stop), drawn.draw(start, stop)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
