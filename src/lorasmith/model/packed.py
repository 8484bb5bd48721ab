"""One forward pass over a Layout, on the module as transformers wrote it.

Shapes: T = tokens of the flat row, N = positions that have a label, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import peft
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from lorasmith.ops.attention import LAYOUT_ATTENTION, LayoutIndex, layout_attention_interface, layout_index
from lorasmith.types import IGNORE_INDEX, Batch


@dataclass(frozen=True)
class DeviceBatch:
    """A Batch as tensors; only positions with a label are kept for the head."""

    input_ids: Tensor  # (1, T)
    position_ids: Tensor  # (1, T)
    rows: Tensor  # (N,) the positions that have a label
    labels: Tensor  # (N,)
    weights: Tensor  # (N,)
    token_numbers: Tensor  # (T,)
    lengths: tuple[int, ...]
    layout: LayoutIndex


def to_device(batch: Batch, device: torch.device) -> DeviceBatch:
    rows = np.flatnonzero(batch.labels != IGNORE_INDEX)
    return DeviceBatch(
        input_ids=torch.from_numpy(batch.input_ids)[None].to(device),
        position_ids=torch.from_numpy(batch.layout.position_ids)[None].to(device),
        rows=torch.from_numpy(rows).to(device),
        labels=torch.from_numpy(batch.labels[rows]).to(device),
        weights=torch.from_numpy(batch.weights[rows]).to(device),
        token_numbers=torch.from_numpy(batch.token_numbers).to(device),
        lengths=tuple(int(n) for n in batch.layout.lengths),
        layout=layout_index(batch.layout, device),
    )


def base_module(module: nn.Module) -> PreTrainedModel:
    """The transformers module, under peft or not."""
    base = module.get_base_model() if isinstance(module, peft.PeftModel) else module
    assert isinstance(base, PreTrainedModel)
    return base


def takes_layout(module: nn.Module) -> bool:
    """Whether every layer goes by the Layout: plain softmax attention behind transformers'
    AttentionInterface, or our own linear attention.

    Others (sliding windows, soft caps, foreign recurrent layers) take rows of one conversation, so nothing
    leaks: a Loader that is not `packed` makes them.
    """
    base = base_module(module)
    return bool(base._supports_attention_backend) and _plain_attention(base.config.get_text_config())


def _plain_attention(config: PretrainedConfig) -> bool:
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
    capped = getattr(config, "attn_logit_softcapping", None)
    return kinds == {"full_attention"} and not windowed and not capped


@contextmanager
def packed_attention(module: nn.Module) -> Iterator[None]:
    """Within: `target_logits` may be called. After: the module generates as before."""
    base = base_module(module)
    before = base.config._attn_implementation
    if not takes_layout(module):
        yield
        return
    AttentionInterface.register(LAYOUT_ATTENTION, layout_attention_interface)
    base.set_attn_implementation(LAYOUT_ATTENTION)
    try:
        yield
    finally:
        base.set_attn_implementation(before)


def target_logits(module: nn.Module, batch: DeviceBatch) -> Tensor:
    """Logits (N, V) of the positions that have a label, in the order of `batch.rows`."""
    if base_module(module).config._attn_implementation != LAYOUT_ATTENTION:
        assert len(batch.lengths) == 1, "a module that takes no Layout runs one conversation at a time"
        alone_TV: Tensor = module(input_ids=batch.input_ids, use_cache=False).logits[0]
        return alone_TV[batch.rows]
    logits: Tensor = module(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        layout=batch.layout,
        logits_to_keep=batch.rows,
        use_cache=False,
    ).logits
    return logits[0]
