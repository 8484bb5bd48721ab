"""Rotary position embedding: every pair of features is a plane, turned by the token's angle.

Shapes: B = rows of a batch, H = heads, T = tokens, D = head size, R = features that turn (the first of D).
Source: Su et al., "RoFormer" (arXiv 2104.09864); the two pairings are those of transformers' Llama (feature i
with i + R/2) and Glm (feature 2i with 2i + 1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorasmith.kernels.twins import triton_twin

Angles = tuple[Tensor, Tensor, Tensor]
"""Cosines of all features (B, 1, T, R), sines of the first and of the second of each pair (B, 1, T, R/2)."""


def rotary(
    q_BHTD: Tensor, k_BKTD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by their positions, as transformers' apply_rotary_pos_emb.

    `interleaved` is Glm's pairing, which reads the first half of cos and sin only. No gradient flows to cos
    and sin.
    Shapes: q (B, H, T, D), k (B, K, T, D), cos and sin (1 or B, T, R) with R <= D -> as q and k, in their
    dtype and, whatever their strides, in the memory order (B, T, H, D).
    """
    if triton_twin("rotary", q_BHTD, k_BKTD) and q_BHTD.dtype == k_BKTD.dtype:
        both: tuple[Tensor, Tensor] = _TritonRotary.apply(  # type: ignore[no-untyped-call]
            q_BHTD, k_BKTD, cos_BTR, sin_BTR, interleaved
        )
        return both
    angles = _angles(cos_BTR, sin_BTR, interleaved)
    q_turned: Tensor = _Rotary.apply(q_BHTD, interleaved, *angles)  # type: ignore[no-untyped-call]
    k_turned: Tensor = _Rotary.apply(k_BKTD, interleaved, *angles)  # type: ignore[no-untyped-call]
    return q_turned, k_turned


def reference_rotary(
    x_BHTD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, *, interleaved: bool = False
) -> Tensor:
    """The definition, which autograd derives, for queries or keys."""
    cos, sin_1, sin_2 = _angles(cos_BTR, sin_BTR, interleaved)
    turning = cos.shape[-1]
    first, second = _pairs(x_BHTD[..., :turning], interleaved)
    crossed = (-second * sin_1, first * sin_2)
    joined = torch.stack(crossed, -1).flatten(-2) if interleaved else torch.cat(crossed, -1)
    turned = x_BHTD[..., :turning] * cos + joined
    return torch.cat((turned, x_BHTD[..., turning:]), -1).to(x_BHTD.dtype)


class _Rotary(torch.autograd.Function):
    """Two passes, one array: x * cos into it, then each half of the pairs adds the other's sine part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, interleaved: bool, cos: Tensor, sin_1: Tensor, sin_2: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin_1, sin_2)
        ctx.interleaved = interleaved
        return _turn(x, interleaved, (cos, sin_1, sin_2), sign=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin_1, sin_2 = ctx.saved_tensors  # the transposed 2 x 2 matrix of every plane
        return (_turn(grad, ctx.interleaved, (cos, sin_2, sin_1), sign=-1), *[None] * 4)


class _TritonRotary(torch.autograd.Function):
    """Queries and keys in one launch each way."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _turn_both(q, k, cos, sin, interleaved, backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        grads = _turn_both(grad_q, grad_k, cos, sin, ctx.interleaved, backward=True)
        wanted = (grad if need else None for grad, need in zip(grads, ctx.needs_input_grad[:2], strict=True))
        return (*wanted, None, None, None)


def _turn_both(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, *, backward: bool
) -> tuple[Tensor, Tensor]:
    twin = triton_twin("rotary", q, k)
    assert twin is not None
    turned: tuple[Tensor, Tensor] = twin.turn(q, k, cos, sin, interleaved=interleaved, backward=backward)
    return turned


def _turn(x_BHTD: Tensor, interleaved: bool, angles: Angles, sign: int) -> Tensor:
    cos = angles[0]
    turning = cos.shape[-1]
    batch, heads, tokens, size = x_BHTD.shape
    out_BHTD = x_BHTD.new_empty(batch, tokens, heads, size).transpose(1, 2)
    x_BHTR, out_BHTR = x_BHTD[..., :turning], out_BHTD[..., :turning]
    if cos.dtype == x_BHTD.dtype:
        _turn_into(out_BHTR, x_BHTR, interleaved, angles, sign)
    else:  # cosines wider than x: round once, at the end
        wide_BHTR = x_BHTR.to(cos.dtype)
        out_BHTR.copy_(_turn_into(torch.empty_like(wide_BHTR), wide_BHTR, interleaved, angles, sign))
    if turning < size:
        out_BHTD[..., turning:] = x_BHTD[..., turning:]
    return out_BHTD


def _turn_into(out: Tensor, x: Tensor, interleaved: bool, angles: Angles, sign: int) -> Tensor:
    cos, sin_1, sin_2 = angles
    torch.mul(x, cos, out=out)
    first, second = _pairs(x, interleaved)
    out_first, out_second = _pairs(out, interleaved)
    out_first.addcmul_(second, sin_1, value=-sign)
    out_second.addcmul_(first, sin_2, value=sign)
    return out


def _pairs(x_BHTR: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of the first and of the second features of all planes."""
    if interleaved:
        return x_BHTR[..., 0::2], x_BHTR[..., 1::2]
    half = x_BHTR.shape[-1] // 2
    return x_BHTR[..., :half], x_BHTR[..., half:]


def _angles(cos_BTR: Tensor, sin_BTR: Tensor, interleaved: bool) -> Angles:
    sin_1, sin_2 = sin_BTR[:, None].chunk(2, dim=-1)
    if not interleaved:
        return cos_BTR[:, None], sin_1, sin_2
    return cos_BTR[:, None, :, : sin_1.shape[-1]].repeat_interleave(2, dim=-1), sin_1, sin_1
