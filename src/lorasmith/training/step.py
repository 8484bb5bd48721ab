"""One optimizer step: loss = sum over the step's targets / their number, however the step is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lorasmith.model.packed import PackedModule
from lorasmith.types import Batch


@dataclass(frozen=True)
class StepResult:
    loss: float
    grad_norm: float
    """L2 norm of all trained gradients, before clipping."""
    num_targets: float
    num_tokens: int
    """Of its conversations, whether computed once or for each."""


def step_gradients(
    model: PackedModule,
    parameters: Sequence[nn.Parameter],
    batches: Sequence[Batch],
    *,
    max_grad_norm: float | None,
) -> StepResult:
    """Forward and backward over the step's rows: the clipped gradient lies in the parameters."""
    num_targets = sum(batch.num_targets for batch in batches)
    loss = accumulate_gradients(model, batches, num_targets)
    limit = float("inf") if max_grad_norm is None else max_grad_norm
    grad_norm = float(nn.utils.clip_grad_norm_(parameters, limit))
    return StepResult(loss, grad_norm, num_targets, sum(batch.num_tokens for batch in batches))


def update(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """One update by the gradients that lie there, which are dropped."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def accumulate_gradients(model: PackedModule, batches: Sequence[Batch], num_targets: float) -> float:
    """Add the gradient of sum(losses) / num_targets to the parameters; returns that loss.

    The numbers are fetched once: a GPU that is asked after each row stands still until the next one is there.
    """
    parts = []
    for batch in batches:
        part = model.loss_sum(model.to_device(batch)) / num_targets
        part.backward()
        parts.append(part.detach())
    loss = 0.0
    for value in torch.stack(parts).tolist() if parts else ():
        loss += value  # sum() of Python 3.12 rounds otherwise than that of 3.11
    return loss
