"""What a step may do to a run, and what not: numbers that are not finite, spikes, and runs that do not learn.

None of this touches a number of the training: a step is taken as it is, or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from lorasmith.batching.source import Alone
from lorasmith.errors import DivergedError
from lorasmith.model.packed import PackedModule
from lorasmith.runs.manifest import RECENT
from lorasmith.types import Batch

_ENOUGH_TO_COMPARE = 20
_SPIKE_MADS = 6.0
"""Median absolute deviations above the median: four standard deviations, if losses were normal."""
_LEAST_MAD = 1e-3
"""In units of the median: losses that are all but equal make no spikes."""
MOVED_BY = 10
"""Steps after which an adapter must have moved: with AdamW one moves all that has a gradient."""


@dataclass(frozen=True)
class RowLoss:
    """The loss of one conversation, in nats per target."""

    origin: str
    loss: float

    def __str__(self) -> str:
        return f"{self.origin} ({self.loss:.4g})"


def not_finite(loss: float, grad_norm: float) -> str | None:
    """What is wrong with a step, or None."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    return None if math.isfinite(grad_norm) else f"the gradient norm is {grad_norm}"


def is_spike(recent: Sequence[float], loss: float) -> bool:
    """Whether the loss stands above median + 6 MAD of the steps before."""
    if len(recent) < _ENOUGH_TO_COMPARE:
        return False
    middle = median(recent)
    spread = max(median(abs(value - middle) for value in recent), _LEAST_MAD * abs(middle))
    return loss > middle + _SPIKE_MADS * spread


def losses_alone(rows: PackedModule, alone: Alone) -> list[RowLoss]:
    """The loss of each conversation by itself, without dropout, the highest first; those not finite lead."""
    with _evaluating(rows.module), torch.no_grad():
        losses = [
            RowLoss(origin, rows.loss_sum(rows.to_device(batch)).item() / batch.num_targets)
            for origin, batch in alone
        ]
    return sorted(losses, key=lambda row: (not math.isfinite(row.loss), row.loss), reverse=True)


def culprits(rows: PackedModule, alone: Alone, parameters: Sequence[nn.Parameter]) -> list[str]:
    """The conversations whose own loss, or else own gradient, is not finite; all of them, if none is.

    Gradients that were there are dropped.
    """
    broken = [row.origin for row in losses_alone(rows, alone) if not math.isfinite(row.loss)]
    if not broken:
        with _evaluating(rows.module):
            broken = [origin for origin, batch in alone if not _finite_gradient(rows, batch, parameters)]
    return broken or [origin for origin, _ in alone]


def require_finite_adapter(parameters: Sequence[nn.Parameter], step: int) -> None:
    """Raises: DivergedError, so that no file ever holds what is not a number."""
    if not all(bool(parameter.isfinite().all()) for parameter in parameters):
        raise DivergedError(
            f"step {step}: the adapter holds values that are not finite",
            why="the last update overflowed; nothing was written from it",
            fix="start again with a lower train.learning_rate",
        )


def require_moved(model: peft.PeftModel, step: int) -> None:
    """For a run whose learning rate is not zero. Raises: DivergedError if every LoRA B is exactly zero."""
    matrices = [module.lora_B["default"].weight for module in _lora_layers(model)]
    if matrices and not any(bool(matrix.any()) for matrix in matrices):
        raise DivergedError(
            f"after {step} steps the adapter has not moved: every LoRA B is exactly zero",
            why="no gradient reaches the adapter, or it is too small for the dtype",
            fix="see that lora.target_modules names modules that the answer runs through; with fp16, use "
            "bf16 or fp32",
        )


def require_moving_loss(recent: Sequence[float], step: int) -> None:
    """For a run whose learning rate is not zero. Raises: DivergedError if 50 losses are the same to the bit.

    A loss of exactly zero is no dead run: everything is learnt.
    """
    if len(recent) == RECENT and len(set(recent)) == 1 and recent[0] != 0:
        raise DivergedError(
            f"after {step} steps the loss has been {recent[0]!r}, to the last digit, for {RECENT} steps",
            why="what is trained does not reach the loss",
            fix="raise train.learning_rate, and see that lora.target_modules names modules that the answer "
            "runs through",
        )


def _lora_layers(model: nn.Module) -> list[LoraLayer]:
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return [layer for layer in layers if "default" in layer.lora_B]


def _finite_gradient(rows: PackedModule, batch: Batch, parameters: Sequence[nn.Parameter]) -> bool:
    for parameter in parameters:
        parameter.grad = None
    (rows.loss_sum(rows.to_device(batch)) / batch.num_targets).backward()
    finite = all(bool(p.grad.isfinite().all()) for p in parameters if p.grad is not None)
    for parameter in parameters:
        parameter.grad = None
    return finite


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    module.eval()
    try:
        yield
    finally:
        module.train()
