"""RMSNorm that keeps its input and one number per row for its backward, where autograd keeps three copies.

Shapes: T = tokens (any leading dimensions, flattened), D = features.
Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (arXiv 1910.07467); rounding as in
transformers' LlamaRMSNorm.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorasmith.kernels.twins import triton_twin


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps), statistics in fp32 or wider.

    A 16-bit x is normalised in fp32, rounded to its own dtype and then multiplied.
    Shapes: x (..., D), weight (D,) -> (..., D) in the wider dtype of both.
    """
    return traced_rms_norm(x_TD, weight_D, eps)[0]


def traced_rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Normed]:
    """`rms_norm`, and what it was made of: who reads it need not keep it for a backward.

    Shapes: x (..., D), weight (D,) -> (..., D), and a `Normed` of the same x and weight.
    """
    out: Tensor
    out, rstd = _RmsNorm.apply(x_TD, weight_D, eps)  # type: ignore[no-untyped-call]
    return out, Normed(x_TD, weight_D, rstd, Remade(eps))


@dataclass
class Remade:
    """A normed array that several backwards need and none keeps: the first makes it, the last drops it."""

    eps: float
    users: int = 0
    _made: Tensor | None = field(default=None, init=False, repr=False)

    def take(self, x_TD: Tensor, weight_D: Tensor, rstd: Tensor) -> Tensor:
        made = _again(x_TD, weight_D, rstd, self.eps) if self._made is None else self._made
        self.users -= 1
        self._made = made if self.users > 0 else None
        return made


@dataclass(frozen=True)
class Normed:
    """Where an RMS norm's output came from: what it keeps for its own backward anyway."""

    x_TD: Tensor
    weight_D: Tensor
    rstd: Tensor
    """1 / sqrt(mean(x^2) + eps) in fp32 or wider: (..., 1) from torch, (N,) over the flat rows from the twin.
    Only the road that made it reads it again."""
    remade: Remade


def reference_rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The definition, which autograd derives."""
    wide_TD = x_TD.to(_wide(x_TD))
    normed_TD = wide_TD * torch.rsqrt(wide_TD.square().mean(-1, keepdim=True) + eps)
    return weight_D * normed_TD.to(x_TD.dtype)


class _RmsNorm(torch.autograd.Function):
    """Passes over T x D: norm 1, two products 2 + 2. On a CPU each fits the last cache, and cutting the rows
    into blocks for a nearer one was measured slower."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if twin := triton_twin("rms_norm", x_TD, weight_D):
            out_TD, rstd = twin.forward(x_TD, weight_D, eps)
        else:
            norm_T1 = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True, dtype=_wide(x_TD))
            rstd = norm_T1.square_().div_(x_TD.shape[-1]).add_(eps).rsqrt_()
            out_TD = _normed(x_TD, weight_D, rstd)
        ctx.save_for_backward(x_TD, weight_D, rstd)
        ctx.mark_non_differentiable(rstd)
        return out_TD, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_TD, weight_D, rstd = ctx.saved_tensors
        grad_x, grad_weight = None, None
        if twin := triton_twin("rms_norm", x_TD, weight_D):
            if ctx.needs_input_grad[0]:
                grad_x = twin.input_gradient(grad_TD, x_TD, weight_D, rstd)
            if ctx.needs_input_grad[1]:
                grad_weight = twin.weight_gradient(grad_TD, x_TD, rstd).to(weight_D.dtype)
            return grad_x, grad_weight, None
        if ctx.needs_input_grad[1]:
            products_TD = _times(x_TD, rstd).to(rstd.dtype).mul_(grad_TD)
            grad_weight = products_TD.reshape(-1, len(weight_D)).sum(0).to(weight_D.dtype)
        if ctx.needs_input_grad[0]:
            grad_x = _input_gradient(grad_TD, x_TD, weight_D, rstd).to(x_TD.dtype)
        return grad_x, grad_weight, None


def _again(x_TD: Tensor, weight_D: Tensor, rstd: Tensor, eps: float) -> Tensor:
    """The output once more, bit by bit."""
    if twin := triton_twin("rms_norm", x_TD, weight_D):
        out_TD: Tensor = twin.forward(x_TD, weight_D, eps)[0]
        return out_TD
    return _normed(x_TD, weight_D, rstd)


def _normed(x_TD: Tensor, weight_D: Tensor, rstd_T1: Tensor) -> Tensor:
    normed_TD = _times(x_TD, rstd_T1)
    return normed_TD.mul_(weight_D) if weight_D.dtype == normed_TD.dtype else normed_TD * weight_D


def _input_gradient(grad_TD: Tensor, x_TD: Tensor, weight_D: Tensor, rstd_T1: Tensor) -> Tensor:
    """rstd * (gw - x * rstd^2 * mean(gw * x)) with gw = grad * weight, in the dtype of rstd."""
    gw_TD = grad_TD.to(rstd_T1.dtype) * weight_D
    dot_T1 = (gw_TD * x_TD).sum(-1, keepdim=True)
    along_T1 = dot_T1.mul_(rstd_T1).mul_(rstd_T1).div_(-x_TD.shape[-1])
    return gw_TD.addcmul_(x_TD.to(rstd_T1.dtype), along_T1).mul_(rstd_T1)


def _times(x_TD: Tensor, rstd_T1: Tensor) -> Tensor:
    """x * rstd, multiplied in the wide dtype and rounded once to that of x."""
    if x_TD.dtype == rstd_T1.dtype:
        return x_TD * rstd_T1
    return torch.mul(x_TD, rstd_T1, out=torch.empty_like(x_TD))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
