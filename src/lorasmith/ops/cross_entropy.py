"""Cross-entropy as a sum, so that cutting a step into pieces cannot change it.

Shapes: N = positions that have a label, V = vocabulary.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cross_entropy_sum(logits_NV: Tensor, labels_N: Tensor, weights_N: Tensor) -> Tensor:
    """Sum over n of weights[n] * -log softmax(logits[n])[labels[n]], in fp32 or wider.

    Returns: a scalar; divide by the step's number of targets.
    """
    wide_NV = logits_NV if logits_NV.dtype.itemsize >= 4 else logits_NV.float()
    losses_N = F.cross_entropy(wide_NV, labels_N, reduction="none")
    return (losses_N * weights_N.to(losses_N.dtype)).sum()
