"""transformers' own norms, feed-forwards and attention, computed by our ops while a model trains.

A module is taken over only if, on this very model, its own forward and ours gave the same.

Shapes: B = rows of a batch, T = tokens, M = hidden size, H = heads, D = head size, F = feed-forward size.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lorasmith.adapters.lora_linear import LoraLinear
from lorasmith.attention.layout import LayoutIndex, layout_attention_interface, layout_index
from lorasmith.attention.rotary import rotary
from lorasmith.ops.rms_norm import Normed, traced_rms_norm
from lorasmith.ops.swiglu import swiglu
from lorasmith.types import Layout

Forward = Callable[..., Any]
Origins: TypeAlias = MutableMapping[Tensor, tuple[Normed, int]]
"""Of the outputs of RMS norms that still live, with the version they had: who writes into one ends that."""
_COMING_TO_REST = threading.Lock()
WAYS_DOWN = ("down_proj", "dense_4h_to_h")
"""The field's names for what a feed-forward ends with: it reads a product, never a norm."""
_PACKED = tuple(zip(("gate_up_proj", "dense_h_to_4h"), WAYS_DOWN, strict=True))
_GATED = ({"gate_proj", "up_proj", "down_proj"}, *map(set, _PACKED))
_SMALL = 16
"""Features of what is tried apart from the model."""


@contextmanager
def fused_ops(module: nn.Module) -> Iterator[None]:
    """Within: RMS norms, SwiGLU feed-forwards and rotary attention of `module` are ours where they agree.

    To be entered when the module's attention goes by a Layout.
    """
    proved: dict[type[nn.Module], bool] = {}
    origins: Origins = WeakTensorKeyDictionary()
    with ExitStack() as stack:
        for part in list(module.modules()):
            ours = _fused_forward(part, origins)
            if ours is None:
                continue
            if type(part) not in proved:
                proved[type(part)] = _agree(part, ours)
            if proved[type(part)]:
                stack.enter_context(replaced_forward(part, ours))
        for linear in _beside_the_ways_down(module):
            stack.enter_context(replaced_forward(linear, _of_normed(linear, origins)))
        yield


@contextmanager
def adapters_at_rest(module: nn.Module) -> Iterator[None]:
    """Within: nobody trains, hooks or changes an adapter of `module`, so its layers need not look.

    Several threads may be within at once: the first one's layers rest, and look again when it leaves.
    """
    with ExitStack() as stack:
        for part in module.modules():
            with (
                _COMING_TO_REST
            ):  # else two threads find a layer bare, and the last leaves the other's forward
                forward = part.at_rest() if isinstance(part, LoraLinear) else None
                if forward is not None:
                    stack.enter_context(replaced_forward(part, forward))
        yield


@contextmanager
def replaced_forward(module: nn.Module, forward: Forward) -> Iterator[None]:
    """Within: calling `module` runs `forward`. Its parameters, hooks and name stay."""
    before = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        if vars(module).get("forward") is forward:  # else it is of somebody who came later
            if before is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = before


def _fused_forward(module: nn.Module, origins: Origins) -> Forward | None:
    """Ours for a module that has the parts of an RMS norm or of a SwiGLU feed-forward."""
    parts = dict(module.named_children())
    if parts.keys() >= {"q_proj", "k_proj", "v_proj", "o_proj"}:
        return _rotary_attention(module)
    if parts.keys() >= _GATED[0]:
        return _gated(parts["gate_proj"], parts["up_proj"], parts["down_proj"])
    for packed, down in _PACKED:
        if parts.keys() >= {packed, down} and _halves(parts[packed], parts[down]):
            return _packed_gated(parts[packed], parts[down])
    if rms_norm_eps(module) is not None:
        return _norm(module, origins)
    return None


def _halves(packed: Any, down: Any) -> bool:
    """Whether one linear layer gives gate and up for the other; a plain feed-forward has the same names."""
    return bool(packed.out_features == 2 * down.in_features)


def rms_norm_eps(module: nn.Module) -> float | None:
    """Its epsilon, if the module has the parts of an RMS norm: one vector, and no module below."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    own = dict(module.named_parameters(recurse=False))
    is_one = own.keys() == {"weight"} and own["weight"].ndim == 1 and not any(module.children())
    return eps if is_one and isinstance(eps, float) else None


def is_rms_norm(module: nn.Module) -> bool:
    """Whether it is an RMS norm as ours, so that its output is made again: tried on a small one of its class,
    since its own weight may be on the meta device."""
    return rms_norm_eps(module) is not None and _class_agrees(type(module))


@torch.no_grad()
def _class_agrees(norm: Callable[[int], nn.Module]) -> bool:
    try:
        small = norm(_SMALL)
    except (TypeError, AttributeError):  # made of more than a width
        return False
    if rms_norm_eps(small) is None:
        return False
    weight_M = small.get_parameter("weight")
    weight_M.copy_(torch.linspace(0.5, 2.0, _SMALL))
    return _agree(small, _norm(small, {}))


def is_swiglu(module: nn.Module) -> bool:
    """Whether it has the parts of a SwiGLU feed-forward, and silu for its activation: tried, where it is a
    function without parameters."""
    parts = dict(module.named_children()).keys()
    activation = getattr(module, "act_fn", getattr(module, "activation_fn", None))
    learned = isinstance(activation, nn.Module) and any(True for _ in activation.parameters())
    if not callable(activation) or learned or not any(parts >= gated for gated in _GATED):
        return False
    x = torch.linspace(-4.0, 4.0, _SMALL)
    return torch.allclose(activation(x), nn.functional.silu(x))


def _norm(module: nn.Module, origins: Origins) -> Forward:
    weight_M, eps = module.get_parameter("weight"), rms_norm_eps(module)
    assert eps is not None

    def forward(x_BTM: Tensor) -> Tensor:
        out_BTM, normed = traced_rms_norm(x_BTM, weight_M, eps)
        if out_BTM.requires_grad:
            origins[out_BTM] = normed, out_BTM._version
        return out_BTM

    return forward


def _of_normed(linear: LoraLinear, origins: Origins) -> Forward:
    def forward(x: Tensor) -> Tensor:
        normed, version = origins.get(x, (None, 0))
        if normed is None or x._version != version:
            return LoraLinear.forward(linear, x)
        return linear.of_normed(x, normed)

    return forward


def _beside_the_ways_down(module: nn.Module) -> list[LoraLinear]:
    """Adapted layers that may read a norm's output, but those whose forward somebody has wrapped."""
    named = {name: part for name, part in module.named_modules() if isinstance(part, LoraLinear)}
    return [
        part
        for name, part in named.items()
        if name.rpartition(".")[2] not in WAYS_DOWN and "forward" not in vars(part)
    ]


def _gated(gate: nn.Module, up: nn.Module, down: nn.Module) -> Forward:
    return lambda x: _down(down, gate(x), up(x))


def _packed_gated(gate_up: nn.Module, down: nn.Module) -> Forward:
    def forward(x_BTM: Tensor) -> Tensor:
        gate_BTF, up_BTF = gate_up(x_BTM).chunk(2, dim=-1)
        return _down(down, gate_BTF, up_BTF)

    return forward


def _down(down: nn.Module, gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
    if isinstance(down, LoraLinear):
        return down.of_swiglu(gate_BTF, up_BTF)
    out_BTM: Tensor = down(swiglu(gate_BTF, up_BTF))
    return out_BTM


def _rotary_attention(module: Any) -> Forward:
    """Attention whose queries and keys are turned in one pass; `module` is one of transformers' own."""

    def forward(
        hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], layout: LayoutIndex, **kwargs: Any
    ) -> tuple[Tensor, None]:
        q_BHTD, k_BKTD, v_BKTD = (
            project(hidden_states).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
            for project in (module.q_proj, module.k_proj, module.v_proj)
        )
        q_BHTD, k_BKTD = rotary(q_BHTD, k_BKTD, *position_embeddings)
        out_BTHD, _ = layout_attention_interface(
            module, q_BHTD, k_BKTD, v_BKTD, None, scaling=module.scaling, layout=layout
        )
        return module.o_proj(out_BTHD.flatten(2)), None

    return forward


@torch.no_grad()
def _agree(module: nn.Module, ours: Forward) -> bool:
    """On random input; LoRA's dropout is stateless, so that both see the same masks."""
    width = next(module.parameters()).shape[-1]
    x_1TM = _random(module, 1, 3, width)
    kwargs: dict[str, Any] = {}
    if head_dim := getattr(module, "head_dim", None):
        layout = layout_index(Layout(np.array([0, 3]), np.array([-1]), np.arange(3)), x_1TM.device)
        angles = _random(module, 1, 3, head_dim // 2).repeat(1, 1, 2)
        kwargs = {"position_embeddings": (angles.cos(), angles.sin()), "layout": layout}
        kwargs |= {"attention_mask": None}
    try:
        own, got = module(x_1TM, **kwargs), ours(x_1TM, **kwargs)
    except (TypeError, ValueError):  # an attention that asks for more is another one
        return False
    own, got = (out[0] if isinstance(out, tuple) else out for out in (own, got))
    eps = torch.finfo(own.dtype).eps
    tolerance = (64 if eps < 1e-6 else 4) * eps * own.abs().max()  # rounding, and nothing else
    return own.dtype == got.dtype and bool(((own - got).abs() <= tolerance).all())


def _random(module: nn.Module, *shape: int) -> Tensor:
    """In the dtype of the frozen base, on its device; an adapter's own weights are wider."""
    like = next((p for p in module.parameters() if not p.requires_grad), next(module.parameters()))
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like)
