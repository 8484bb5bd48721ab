"""Held-out loss: the mean over all targets of the set, not a mean of batch means."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from lorasmith.model.packed import PackedModule, packed
from lorasmith.types import Batch


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
