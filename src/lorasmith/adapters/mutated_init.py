"""Initialisations that move a part of the base weights into the adapter (PiSSA, OLoRA).

They leave W' = W - s B0 A0 in the base and start the adapter at (A0, B0), so the trained adapter alone would
be wrong on the original model. What is saved is the difference s (B A - B0 A0) = s [B, -B0] [A; A0]: a plain
LoRA of twice the rank that any reader adds to the original W (PEFT docs, "PiSSA", weight conversion).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import peft
import torch
from torch import Tensor

from lorasmith.config import LoraConfig
from lorasmith.errors import ConfigError

_MOVING = ("pissa", "olora")
_WITH_DATA = ("corda", "eva", "loftq", "lora_ga")


def moves_base_weights(config: LoraConfig) -> bool:
    """Raises: ConfigError for an initialisation that wants data or quantisation, or does not go with DoRA."""
    init = config.init_lora_weights
    if not isinstance(init, str):
        return False
    if init.startswith(_WITH_DATA):
        raise ConfigError(
            f"lora.init_lora_weights {init!r} is not supported",
            why="it needs a pass over data or a quantised base before training",
            fix="use true, gaussian, orthogonal, pissa or olora",
        )
    if init.startswith(_MOVING) and config.use_dora:
        raise ConfigError(f"lora.init_lora_weights {init!r} does not go with lora.use_dora")
    return init.startswith(_MOVING)


def as_plain_lora(tensors: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter (A, B) that started at (A0, B0), as ([A; A0], [B, -B0]) over the original base."""
    return {name: _doubled(name, tensor, initial[name]) for name, tensor in tensors.items()}


def _doubled(name: str, tensor: Tensor, initial: Tensor) -> Tensor:
    if ".lora_A." in name:
        return torch.cat([tensor, initial], dim=0)
    return torch.cat([tensor, -initial], dim=1) if ".lora_B." in name else tensor


def plain_config(config: peft.LoraConfig) -> dict[str, Any]:
    """What changes in adapter_config.json: twice the rank at the same scale."""
    alpha = config.lora_alpha * (math.sqrt(2) if config.use_rslora else 2)
    return {"r": 2 * config.r, "lora_alpha": alpha, "init_lora_weights": True}
