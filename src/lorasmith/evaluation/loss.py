"""Held-out loss: the mean over all targets of the set, not a mean of batch means."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from lorasmith.model.packed import packed_attention, target_logits, to_device
from lorasmith.ops.cross_entropy import cross_entropy_sum
from lorasmith.types import Batch


def held_out_loss(module: nn.Module, batches: Iterable[Batch]) -> float:
    """Negative log-likelihood in nats per target token. The module must be in eval mode."""
    device = next(module.parameters()).device
    loss, num_targets = 0.0, 0.0
    with torch.no_grad(), packed_attention(module):
        for batch in batches:
            on_device = to_device(batch, device)
            logits_NV = target_logits(module, on_device)
            loss += cross_entropy_sum(logits_NV, on_device.labels, on_device.weights).item()
            num_targets += batch.num_targets
    return loss / num_targets
