"""Held-out loss: the mean over all targets of the set, not a mean of batch means."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from lorasmith.batching.loader import held_out_loader
from lorasmith.config import TrainConfig
from lorasmith.model.packed import PackedModule, packed, takes_layout
from lorasmith.training.session import HeldOutLoss
from lorasmith.types import Batch, Example


def held_out_loss(module: nn.Module, batches: Iterable[Batch]) -> float:
    """Negative log-likelihood in nats per target token. The module must be in eval mode."""
    with packed(module) as rows:
        return mean_loss(rows, batches)


@torch.no_grad()
def mean_loss(module: PackedModule, batches: Iterable[Batch]) -> float:
    """The same over a module that is packed already, as it is while it trains."""
    loss, num_targets = 0.0, 0.0
    for batch in batches:
        loss += module.loss_sum(module.to_device(batch)).item()
        num_targets += batch.num_targets
    return loss / num_targets


def loss_while_training(
    held_out: Sequence[Example], config: TrainConfig, base: nn.Module
) -> HeldOutLoss | None:
    """The loss over the held-out rows of a run, which are packed as its own; None where there are none."""
    rows = held_out_loader(held_out, config, packed=takes_layout(base))
    return (lambda module, most: mean_loss(module, rows.epoch(max_tokens=most))) if rows else None
