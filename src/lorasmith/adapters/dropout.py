"""LoRA's dropout with masks that are a function of (seed, step, module): the same after a resume and under
activation checkpointing, whatever way a step is cut into micro-batches."""

from __future__ import annotations

from dataclasses import dataclass, field

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lorasmith.ops.dropout import DropoutMask, dropout, dropout_key, token_hashes


@dataclass
class DropoutClock:
    """Where training stands; the train step sets it and every dropout module of the run reads it."""

    seed: int
    step: int = 0
    token_numbers: Tensor | None = None
    """(T,) Those of the row under way, on its device; None counts from 0."""
    _hashed: tuple[int, Tensor, Tensor] | None = field(default=None, init=False, repr=False)
    """The step, the numbers, and their hashes: all modules of a row ask for the same."""

    def tokens(self, x: Tensor) -> Tensor:
        """(T,) hashes of the tokens of x (..., D) at this step."""
        numbers, key = self.token_numbers, dropout_key(self.seed, self.step, "")
        if numbers is None:
            return token_hashes(torch.arange(x.shape[:-1].numel(), device=x.device), key)
        if self._hashed is None or self._hashed[0] != self.step or self._hashed[1] is not numbers:
            self._hashed = (self.step, numbers, token_hashes(numbers, key))
        return self._hashed[2]


class StatelessDropout(nn.Module):
    def __init__(self, p: float, name: str, clock: DropoutClock) -> None:
        super().__init__()
        self.p, self.name, self.clock = p, name, clock

    def forward(self, x: Tensor) -> Tensor:
        mask = self.mask(x)
        return x if mask is None else dropout(x, mask)

    def mask(self, x: Tensor) -> DropoutMask | None:
        """That of x (..., D) at the clock's step; None where nothing is dropped."""
        if not self.training:
            return None
        key = dropout_key(self.clock.seed, self.clock.step, self.name)
        return DropoutMask(self.p, key, self.clock.tokens(x))

    def extra_repr(self) -> str:
        return f"p={self.p}"


def use_stateless_dropout(model: peft.PeftModel, clock: DropoutClock) -> None:
    """Replace the dropout of every LoRA layer of adapter "default"."""
    p = model.peft_config["default"].lora_dropout
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and "default" in module.lora_dropout:
            module.lora_dropout["default"] = StatelessDropout(p, name, clock) if p > 0 else nn.Identity()
