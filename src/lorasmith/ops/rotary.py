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

Angles = tuple[Tensor, Tensor, Tensor, Tensor]
"""Cosines and sines for the first features of the pairs, then both for the second ones: (B, 1, T, R/2)."""


def rotary(
    q_BHTD: Tensor, k_BKTD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by their positions, as transformers' apply_rotary_pos_emb.

    `interleaved` is Glm's pairing, which reads the first half of cos and sin only. No gradient flows to cos
    and sin.
    Shapes: q (B, H, T, D), k (B, K, T, D), cos and sin (1 or B, T, R) with R <= D -> as q and k, in their
    dtype and, whatever their strides, in the memory order (B, T, H, D).
    """
    angles = _angles(cos_BTR, sin_BTR, interleaved)
    q_turned: Tensor = _Rotary.apply(q_BHTD, interleaved, *angles)  # type: ignore[no-untyped-call]
    k_turned: Tensor = _Rotary.apply(k_BKTD, interleaved, *angles)  # type: ignore[no-untyped-call]
    return q_turned, k_turned


def reference_rotary(
    x_BHTD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, *, interleaved: bool = False
) -> Tensor:
    """The definition, which autograd derives, for queries or keys."""
    first, second, *rest = _pairs(x_BHTD, cos_BTR.shape[-1], interleaved)
    cos_1, sin_1, cos_2, sin_2 = _angles(cos_BTR, sin_BTR, interleaved)
    turned = (first * cos_1 - second * sin_1, second * cos_2 + first * sin_2)
    joined = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat((joined, *rest), -1).to(x_BHTD.dtype)


class _Rotary(torch.autograd.Function):
    """Two passes, one array: x * cos into it, then each half of the pairs adds the other's sine part."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, interleaved: bool, cos_1: Tensor, sin_1: Tensor, cos_2: Tensor, sin_2: Tensor
    ) -> Tensor:
        ctx.save_for_backward(cos_1, sin_1, cos_2, sin_2)
        ctx.interleaved = interleaved
        return _turn(x, interleaved, (cos_1, sin_1, cos_2, sin_2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos_1, sin_1, cos_2, sin_2 = ctx.saved_tensors  # the transposed 2 x 2 matrix of every plane
        return (_turn(grad, ctx.interleaved, (cos_1, -sin_2, cos_2, -sin_1)), *[None] * 5)


def _turn(x_BHTD: Tensor, interleaved: bool, angles: Angles) -> Tensor:
    cos_1, sin_1, cos_2, sin_2 = angles
    turning = 2 * cos_1.shape[-1]
    batch, heads, tokens, size = x_BHTD.shape
    out_BHTD = x_BHTD.new_empty(batch, tokens, heads, size).transpose(1, 2)
    first, second, *rest = _pairs(x_BHTD, turning, interleaved)
    out_first, out_second, *out_rest = _pairs(out_BHTD, turning, interleaved)
    for ours, mine, other, cos, sin, sign in (
        (out_first, first, second, cos_1, sin_1, -1),
        (out_second, second, first, cos_2, sin_2, 1),
    ):
        if cos.dtype == x_BHTD.dtype:
            torch.mul(mine, cos, out=ours).addcmul_(other, sin, value=sign)
        else:  # cosines wider than x: round once, at the end
            ours.copy_((mine * cos).addcmul_(other.to(cos.dtype), sin, value=sign))
    for ours, theirs in zip(out_rest, rest, strict=True):
        ours.copy_(theirs)
    return out_BHTD


def _pairs(x_BHTD: Tensor, turning: int, interleaved: bool) -> tuple[Tensor, ...]:
    """Views: first features of all planes, second features, and, if some do not turn, those."""
    rest = (x_BHTD[..., turning:],) if turning < x_BHTD.shape[-1] else ()
    if interleaved:
        return (x_BHTD[..., 0:turning:2], x_BHTD[..., 1:turning:2], *rest)
    return (x_BHTD[..., : turning // 2], x_BHTD[..., turning // 2 : turning], *rest)


def _angles(cos_BTR: Tensor, sin_BTR: Tensor, interleaved: bool) -> Angles:
    cos_1, cos_2 = cos_BTR[:, None].chunk(2, dim=-1)
    sin_1, sin_2 = sin_BTR[:, None].chunk(2, dim=-1)
    return (cos_1, sin_1, cos_1, sin_1) if interleaved else (cos_1, sin_1, cos_2, sin_2)
