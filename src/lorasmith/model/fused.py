"""transformers' own norms and feed-forwards, computed by our ops while a model trains.

A module is taken over only if, on this very model, its own forward and ours gave the same.

Shapes: B = rows of a batch, T = tokens, D = hidden size, F = feed-forward size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from lorasmith.ops.rms_norm import rms_norm
from lorasmith.ops.swiglu import swiglu

Forward = Callable[[Tensor], Tensor]


@contextmanager
def fused_ops(module: nn.Module) -> Iterator[None]:
    """Within: every RMS norm and every SwiGLU feed-forward of `module` that is one to the digit is ours."""
    proved: dict[type[nn.Module], bool] = {}
    with ExitStack() as stack:
        for part in list(module.modules()):
            ours = _fused_forward(part)
            if ours is None:
                continue
            if type(part) not in proved:
                proved[type(part)] = _agree(part, ours)
            if proved[type(part)]:
                stack.enter_context(replaced_forward(part, ours))
        yield


@contextmanager
def replaced_forward(module: nn.Module, forward: Forward) -> Iterator[None]:
    """Within: calling `module` runs `forward`. Its parameters, hooks and name stay."""
    before = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = before


def _fused_forward(module: nn.Module) -> Forward | None:
    """Ours for a module that has the parts of an RMS norm or of a SwiGLU feed-forward."""
    parts = dict(module.named_children())
    if parts.keys() >= {"gate_proj", "up_proj", "down_proj"}:
        return _gated(parts["gate_proj"], parts["up_proj"], parts["down_proj"])
    for packed, down in (("gate_up_proj", "down_proj"), ("dense_h_to_4h", "dense_4h_to_h")):
        if parts.keys() >= {packed, down}:
            return _packed_gated(parts[packed], parts[down])
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    own = dict(module.named_parameters(recurse=False))
    if not parts and own.keys() == {"weight"} and own["weight"].ndim == 1 and isinstance(eps, float):
        return _norm(own["weight"], eps)
    return None


def _norm(weight_D: Tensor, eps: float) -> Forward:
    return lambda x: rms_norm(x, weight_D, eps)


def _gated(gate: nn.Module, up: nn.Module, down: nn.Module) -> Forward:
    return lambda x: _module_out(down, swiglu(gate(x), up(x)))


def _packed_gated(gate_up: nn.Module, down: nn.Module) -> Forward:
    def forward(x_BTD: Tensor) -> Tensor:
        gate_BTF, up_BTF = gate_up(x_BTD).chunk(2, dim=-1)
        return _module_out(down, swiglu(gate_BTF, up_BTF))

    return forward


def _module_out(module: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = module(x)
    return out


@torch.no_grad()
def _agree(module: nn.Module, ours: Forward) -> bool:
    """On random input; LoRA's dropout is stateless, so that both see the same masks."""
    first = next(module.parameters())
    width = first.shape[-1]
    generator = torch.Generator().manual_seed(0)
    x_1TD = torch.randn(1, 3, width, generator=generator).to(first.device, _input_dtype(module))
    own: Tensor = module(x_1TD)
    got = ours(x_1TD)
    tolerance = 8 * torch.finfo(own.dtype).eps
    return own.dtype == got.dtype and torch.allclose(own, got, rtol=tolerance, atol=tolerance)


def _input_dtype(module: nn.Module) -> torch.dtype:
    """The base's; an adapter's own weights are wider."""
    frozen = [p.dtype for p in module.parameters() if not p.requires_grad]
    return frozen[0] if frozen else next(module.parameters()).dtype
