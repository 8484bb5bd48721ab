"""SwiGLU's elementwise half, silu(gate) * up, which keeps its two inputs for its backward and no third array.

Shapes: T = tokens (any leading dimensions), F = features between the projections.
Source: Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorasmith.kernels.twins import triton_twin


def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """silu(gate) * up; for 16 bits silu is rounded before it is multiplied, as in the unfused form.

    Shapes: (..., F) both, of one dtype -> (..., F).
    """
    out: Tensor = _SwiGlu.apply(gate_TF, up_TF)  # type: ignore[no-untyped-call]
    return out


def reference_swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """The definition, which autograd derives."""
    return F.silu(gate_TF) * up_TF


class _SwiGlu(torch.autograd.Function):
    """silu is made again in the backward: a tenth of this op's time for a third of its memory."""

    @staticmethod
    def forward(ctx: Any, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_TF, up_TF)
        return swiglu_value(gate_TF, up_TF)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TF: Tensor) -> tuple[Tensor | None, Tensor | None]:
        gate_TF, up_TF = ctx.saved_tensors
        return swiglu_gradients(grad_TF, gate_TF, up_TF, ctx.needs_input_grad[:2])


def swiglu_value(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """`swiglu` for the inside of autograd functions."""
    if twin := triton_twin("swiglu", gate_TF, up_TF):
        out_TF: Tensor = twin.forward(gate_TF, up_TF)
        return out_TF
    return F.silu(gate_TF).mul_(up_TF)


def swiglu_gradients(
    grad_TF: Tensor, gate_TF: Tensor, up_TF: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients by gate and up that are needed, each made in place of its first factor.

    Row blocks were measured slower on a CPU.
    """
    if twin := triton_twin("swiglu", gate_TF, up_TF):
        both: tuple[Tensor, Tensor] = twin.gradients(grad_TF, gate_TF, up_TF)
        return both
    grad_gate, grad_up = None, None
    if needs[1]:
        grad_up = F.silu(gate_TF).mul_(grad_TF)
    if needs[0]:
        grad_gate = grad_TF * up_TF
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate_TF, grad_input=grad_gate)
    return grad_gate, grad_up
