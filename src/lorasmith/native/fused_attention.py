"""Attention behind one fused projection, whose rows are all queries, then all keys, then all values.

Shapes: B = rows of a batch, T = tokens, C = columns of the projection, H = query heads, K = key/value heads,
D = head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Rotation: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Queries and keys -> both rotated by their positions, computed in fp32 whatever the model's dtype."""
AttentionFunction: TypeAlias = Callable[..., tuple[Tensor, Tensor | None]]
"""In the shape of transformers' AttentionInterface."""


def fused_width(config: Any) -> int:
    """Rows of the fused projection."""
    return int((config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim)


def attend_fused(
    module: Any,
    packed_BTC: Tensor,
    rotation: Rotation | None,
    attention_mask: Tensor | None,
    past_key_values: Cache | None,
    *,
    eager: AttentionFunction,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What the heads read, (B, T, H*D), and the weights where the implementation gives them.

    `module` is one of transformers' attention modules: its config, layer_idx and scaling are used. `eager` is
    what its config calls by this name.
    """
    config = module.config
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    by_head = packed_BTC.unflatten(-1, (sum(heads), config.head_dim)).transpose(1, 2)
    q_BHTD, k_BKTD, v_BKTD = by_head.split(heads, dim=1)
    if rotation is not None:
        q_BHTD, k_BKTD = (x.to(v_BKTD.dtype) for x in rotation(q_BHTD, k_BKTD))
    if past_key_values is not None:
        # the oldest transformers of our range say where new keys go, and a preallocated cache asks for it
        where = [{"cache_position": kwargs["cache_position"]}] if "cache_position" in kwargs else []
        k_BKTD, v_BKTD = past_key_values.update(k_BKTD, v_BKTD, module.layer_idx, *where)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager)
    out_BTHD, weights = attend(
        module, q_BHTD, k_BKTD, v_BKTD, attention_mask, scaling=module.scaling, **kwargs
    )
    return out_BTHD.flatten(2), weights
