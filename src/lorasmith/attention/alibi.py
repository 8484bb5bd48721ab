"""ALiBi: instead of rotating queries and keys, each score is lowered by the distance to its key.

Shapes: B = rows of a batch, H = heads, Q = queries, K = keys.
Source: Press et al., "Train Short, Test Long" (arXiv 2108.12409), section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_MASKED = torch.finfo(torch.float32).min
"""Finite, so that a padded query, which may look nowhere, yields numbers and not NaN."""


def alibi_slopes(num_heads: int) -> list[float]:
    """One slope for each head: 2^(-8/n), 2^(-16/n), ... for the largest power of two n in `num_heads`, and
    for the heads beyond it every second slope of 2n heads."""
    power = 1 << (num_heads.bit_length() - 1)
    first = [2.0 ** (-8 * (head + 1) / power) for head in range(power)]
    return first + [2.0 ** (-4 * (2 * head + 1) / power) for head in range(num_heads - power)]


def alibi_bias(slopes_H: Tensor, queries_Q: Tensor, keys_K: Tensor) -> Tensor:
    """slope * (j - i) for a query at position i and a key at position j, in the dtype of `slopes_H`.

    Only differences count, so positions may start anywhere. Returns: (H, Q, K).
    """
    return slopes_H[:, None, None] * (keys_K[None, :] - queries_Q[:, None])


def alibi_mask(
    slopes_H: Tensor, attention_mask: Tensor | None, *, num_queries: int, num_keys: int, past: int
) -> Tensor:
    """Bias and causal mask in one, to be added to the scores of queries that stand behind `past` keys.

    `attention_mask` is (B, up to K) with 0 at padding, or (B, 1 or H, Q, K), boolean or to be added.
    Returns: (1 or B, H, Q, K).
    """
    keys_K = torch.arange(num_keys, device=slopes_H.device)
    queries_Q = torch.arange(past, past + num_queries, device=slopes_H.device)
    bias_HQK = alibi_bias(slopes_H, queries_Q, keys_K)[None]
    if attention_mask is not None and attention_mask.ndim == 4:
        if attention_mask.dtype != torch.bool:
            return (bias_HQK + attention_mask).clamp_min(_MASKED)
        return torch.where(attention_mask, bias_HQK, _MASKED)
    seen = (keys_K <= queries_Q[:, None])[None, None]
    if attention_mask is not None:  # a preallocated cache has keys beyond the mask: all in the future
        real_BK = F.pad(attention_mask.bool(), (0, num_keys - attention_mask.shape[1]), value=True)
        seen = seen & real_BK[:, None, None]
    return torch.where(seen, bias_HQK, _MASKED)
