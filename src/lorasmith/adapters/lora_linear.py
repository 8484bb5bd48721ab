"""peft's LoRA linear layer with a fast road for its plain case."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lorasmith.adapters.dropout import StatelessDropout
from lorasmith.ops.dropout import DropoutMask
from lorasmith.ops.lora_linear import lora_linear, swiglu_lora_linear
from lorasmith.ops.rms_norm import Normed
from lorasmith.ops.swiglu import swiglu


class LoraLinear(Linear):  # type: ignore[misc]
    """peft's own in names, files, merging and every variant; only the plain forward pass is ours."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not self._is_plain(x):
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        return lora_linear(x, *self._operands(x))

    def of_normed(self, x: Tensor, normed: Normed) -> Tensor:
        """`self(x)` without keeping x, an RMS norm's output, for the backward."""
        if not self._is_plain(x):
            return LoraLinear.forward(self, x)
        return lora_linear(x, *self._operands(x), normed=normed)

    def of_swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """`self(swiglu(gate, up))` without a third array of their size for the backward."""
        if _is_watched(self) or not self._is_plain(gate):
            out: Tensor = self(swiglu(gate, up))
            return out
        return swiglu_lora_linear(gate, up, *self._operands(gate))

    def at_rest(self) -> Callable[[Tensor], Tensor] | None:
        """`forward` for as long as nothing about this layer changes and it does not train; None if not plain.

        Not to ask each time whether it is plain saves a quarter of what a token costs here.
        """
        weight = self.base_layer.weight
        if self.training or _is_watched(self) or not self._is_plain(weight):
            return None
        _, bias, a, b, scaling, _ = self._operands(weight)
        return partial(
            lora_linear,
            w_OD=weight,
            bias_O=bias,
            a_RD=a.to(weight.dtype),
            b_OR=b.to(weight.dtype),
            scaling=scaling,
        )

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor, float, DropoutMask | None]:
        """What `lora_linear` takes behind x."""
        name, base = self.active_adapters[0], self.base_layer
        dropout = self.lora_dropout[name]
        mask = dropout.mask(x) if isinstance(dropout, StatelessDropout) else None
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return base.weight, base.bias, a, b, self.scaling[name], mask

    def _is_plain(self, x: Tensor) -> bool:
        """One adapter, unmerged and of no variant, over a frozen linear layer of x's dtype, without hooks."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return False
        name, base = self.active_adapters[0], self.base_layer
        if name not in self.lora_A or name in self.lora_variant or self.lora_bias[name]:
            return False
        return (
            x.dtype == base.weight.dtype
            and not torch.is_autocast_enabled(x.device.type)
            and not base.weight.requires_grad
            and (base.bias is None or not base.bias.requires_grad)
            and not any(_is_watched(module) for module in (base, self.lora_A[name], self.lora_B[name]))
            and _drops_statelessly(self.lora_dropout[name])
        )


def _is_watched(module: nn.Module) -> bool:
    """Whether somebody hooked the module or wrapped its forward, as accelerate does to move weights."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    return any(hooks) or bool(module._backward_pre_hooks) or "forward" in vars(module)


def _drops_statelessly(module: nn.Module) -> bool:
    return isinstance(module, StatelessDropout | nn.Identity) or not module.training


def use_fast_linear(config: peft.LoraConfig) -> None:
    """Have peft build its LoRA layers over plain linear layers as `LoraLinear`."""
    config._register_custom_module({nn.Linear: _over_plain_linear})


def _over_plain_linear(target: nn.Module, adapter_name: str, **kwargs: Any) -> LoraLinear | None:
    """None leaves the target to peft's own dispatch: a quantised linear layer, a parameter by name."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if type(base) is not nn.Linear or kwargs.get("parameter_name") or kwargs["config"].fan_in_fan_out:
        return None
    return LoraLinear(target, adapter_name, **kwargs)
