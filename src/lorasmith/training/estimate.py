"""What a run will need, from config.json alone: parameters counted on the meta device, memory by formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import peft
import torch
from transformers import PretrainedConfig

from lorasmith.config import LoraConfig
from lorasmith.model.adapter import peft_lora_config, quiet_peft
from lorasmith.model.load import empty_module


@dataclass(frozen=True)
class ParameterCount:
    trainable: int
    total: int
    """The adapter included, as PEFT prints it."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes."""

    weights: int
    adapter: int
    """fp32 values, gradients and two AdamW moments: 16 bytes a parameter."""
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.activations


@dataclass(frozen=True)
class Plan:
    """What a run will do and need, without its weights."""

    num_examples: int
    num_held_out: int
    tokens_per_epoch: int
    targets_per_epoch: int
    saved_by_sharing: float
    """Share of the tokens that need no computing, as an earlier conversation of the row has them: over the
    steps that were planned."""
    total_steps: int
    parameters: ParameterCount
    memory: MemoryEstimate
    dtype: str
    family: str


def count_parameters(
    config: PretrainedConfig, lora: LoraConfig, family_targets: Sequence[str] | None
) -> ParameterCount:
    """Exact, and without memory. Raises: ConfigError if the targets match nothing in this model."""
    module = empty_module(config)
    peft_config = peft_lora_config(module, lora, family_targets=family_targets, base_name="base")
    with torch.device("meta"), quiet_peft():
        model = peft.get_peft_model(module, peft_config)
    return ParameterCount(*model.get_nb_trainable_parameters())


def estimate_memory(
    config: PretrainedConfig,
    count: ParameterCount,
    dtype: torch.dtype,
    *,
    row_tokens: int,
    row_targets: int,
    activation_checkpointing: bool,
) -> MemoryEstimate:
    """Peak memory of a step whose largest row has `row_tokens` tokens, `row_targets` of them with a label.

    Per token and layer a forward pass keeps about 16 hidden and 6 feed-forward rows (inputs of the linear
    layers, their dropped-out copies, norms and rotations); the head keeps logits and their gradient in fp32.
    """
    text = config.get_text_config()
    hidden, layers = int(text.hidden_size), int(text.num_hidden_layers)
    feed_forward = int(getattr(text, "intermediate_size", None) or 4 * hidden)
    layer_row = 16 * hidden + 6 * feed_forward
    rows = layers * hidden + layer_row if activation_checkpointing else layers * layer_row
    return MemoryEstimate(
        weights=(count.total - count.trainable) * dtype.itemsize,
        adapter=16 * count.trainable,
        activations=row_tokens * rows * dtype.itemsize
        + row_targets * int(text.vocab_size) * (8 + dtype.itemsize),
    )
