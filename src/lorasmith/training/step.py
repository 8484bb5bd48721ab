"""One optimizer step: loss = sum over the step's targets / their number, however the step is cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from lorasmith.errors import DivergedError, MemoryLimitError
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


def train_step(
    model: PackedModule,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    *,
    learning_rate: float,
    max_grad_norm: float | None,
) -> StepResult:
    """Forward and backward over the step's rows, then one update.

    Raises: DivergedError before the update if the loss or the gradient is not finite.
    """
    num_targets = sum(batch.num_targets for batch in batches)
    loss = accumulate_gradients(model, batches, num_targets)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    limit = float("inf") if max_grad_norm is None else max_grad_norm
    grad_norm = float(nn.utils.clip_grad_norm_(parameters, limit))
    _require_finite(model.clock.step, loss, grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(loss, grad_norm, num_targets, sum(batch.num_tokens for batch in batches))


def accumulate_gradients(model: PackedModule, batches: Sequence[Batch], num_targets: float) -> float:
    """Add the gradient of sum(losses) / num_targets to the parameters; returns that loss."""
    loss = 0.0
    for batch in batches:
        part = model.loss_sum(model.to_device(batch)) / num_targets
        part.backward()
        loss += part.item()
    return loss


@contextmanager
def memory_told() -> Iterator[None]:
    """Raises: MemoryLimitError where torch runs out of memory within, on a GPU or a CPU."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise MemoryLimitError(
            "a training step does not fit into memory",
            why=str(error).strip().splitlines()[0],
            fix="lower train.max_tokens (the result stays the same) and go on with --resume; or start again "
            "with train.activation_checkpointing: true or a lower data.max_length",
        ) from error


def _require_finite(step: int, loss: float, grad_norm: float) -> None:
    if not torch.isfinite(torch.tensor([loss, grad_norm])).all():
        raise DivergedError(
            f"step {step + 1}: loss {loss}, gradient norm {grad_norm}",
            why="the run diverged; the step was not taken and nothing was written from it",
            fix="go on from the last checkpoint with a lower train.learning_rate, or use dtype bf16 or fp32",
        )
