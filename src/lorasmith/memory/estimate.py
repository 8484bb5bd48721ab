"""What a run will need, from config.json alone: parameters counted on the meta device, memory by formula."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PretrainedConfig

from lorasmith.adapters.lora import peft_lora_config, quiet_peft
from lorasmith.config import LoraConfig
from lorasmith.errors import ConfigError
from lorasmith.model.checkpointing import decoder_layers
from lorasmith.model.fp8 import frozen_linears
from lorasmith.model.fused import WAYS_DOWN, is_rms_norm, is_swiglu
from lorasmith.model.load import empty_module
from lorasmith.model.packed import takes_layout
from lorasmith.types import IGNORE_INDEX, Batch

_CPU_TILE, _GPU_TILE = 6 << 20, 256 << 20
"""Bytes of logits at a time, as `ops.cross_entropy` cuts them."""
_MARGIN = 1.25
"""What is needed may be so much more than the estimate: it is checked to 30 %."""


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

    @property
    def to_come(self) -> int:
        """Once base and adapter are there: gradients, moments, activations."""
        return self.adapter * 3 // 4 + self.activations


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
    free_memory: int | None
    """Bytes on the device that this machine would take; None where nobody can tell."""
    recomputed_layers: int
    num_layers: int
    dtype: str
    family: str


def adapted_on_meta(
    config: PretrainedConfig, lora: LoraConfig, family_targets: Sequence[str] | None
) -> peft.PeftModel:
    """Base and adapter without memory. Raises: ConfigError if the targets match nothing in this model."""
    module = empty_module(config)
    peft_config = peft_lora_config(module, lora, family_targets=family_targets, base_name="base")
    with torch.device("meta"), quiet_peft():
        return peft.get_peft_model(module, peft_config)


def count_parameters(model: peft.PeftModel) -> ParameterCount:
    """Exact."""
    return ParameterCount(*model.get_nb_trainable_parameters())


@dataclass(frozen=True)
class ActivationWidths:
    """Numbers that a token leaves for the backward pass."""

    layers: tuple[int, ...]
    """By each decoder layer, if it does not recompute."""
    hidden: int
    vocabulary: int


def activation_widths(model: peft.PeftModel) -> ActivationWidths:
    """From the linear layers: what each one gives is kept by what comes next (a norm, attention, the gate),
    and what it reads is kept if it has LoRA, once for those that read the same, unless it is made again."""
    layers = decoder_layers(model) or [model]
    text = model.get_base_model().config.get_text_config()
    by_layout = takes_layout(model)  # the others compute by their own ops
    kept = tuple(_kept(layer, by_layout) for layer in layers)
    return ActivationWidths(kept, int(text.hidden_size), int(text.vocab_size))


def _kept(layer: nn.Module, by_layout: bool) -> int:
    remade = by_layout and any(is_swiglu(part) for part in layer.modules())
    normed = remade and any(is_rms_norm(part) for part in layer.modules())
    return sum(_kept_by_block(block, remade, normed) for block in _blocks(layer))


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The module and all below it, but what lies inside a LoRA layer: what that keeps is small."""
    yield module
    for part in module.children():
        if not isinstance(part, LoraLayer):
            yield from _blocks(part)


def _kept_by_block(block: nn.Module, remade: bool, normed: bool) -> int:
    """Of the linear layers of an attention or a feed-forward, the last reads what the others made.

    The backward of our own ops makes again an RMS norm's output (`normed`) and SwiGLU's product (`remade`).
    """
    parts = {n: m for n, m in block.named_children() if isinstance(m, LoraLayer | nn.Linear)}
    linears = [m.get_base_layer() if isinstance(m, LoraLayer) else m for m in parts.values()]
    adapted = [isinstance(m, LoraLayer) for m in parts.values()]
    if not linears or not all(isinstance(linear, nn.Linear) for linear in linears):
        return 0
    outputs = sum(linear.out_features for linear in linears)
    shared = linears[0].in_features if any(adapted[:-1]) and not normed else 0
    product = remade and list(parts)[-1] in WAYS_DOWN
    read_last = linears[-1].in_features if adapted[-1] and not product else 0
    return int(outputs + shared + read_last)


def estimate_memory(
    recomputed_layers: int,
    *,
    widths: ActivationWidths,
    count: ParameterCount,
    dtype: torch.dtype,
    row_tokens: int,
    row_targets: int,
    on_gpu: bool,
    saved_by_fp8: int = 0,
) -> MemoryEstimate:
    """Peak memory of a step whose largest row has `row_tokens` tokens, `row_targets` of them with a label.

    The first `recomputed_layers` keep their input; one layer at a time is computed again, and works on as
    much again as half of what it keeps. The head keeps a gradient for each target, and a tile of logits.
    """
    kept = sum(widths.layers[recomputed_layers:]) or max(widths.layers)
    per_token = kept + recomputed_layers * widths.hidden + max(widths.layers) // 2
    tile = min(_GPU_TILE if on_gpu else _CPU_TILE, 4 * row_targets * widths.vocabulary)
    head = row_targets * 3 * widths.hidden * dtype.itemsize + 3 * tile
    return MemoryEstimate(
        weights=(count.total - count.trainable) * dtype.itemsize - saved_by_fp8,
        adapter=16 * count.trainable,
        activations=row_tokens * per_token * dtype.itemsize + head,
    )


def needed_memory(
    model: peft.PeftModel,
    rows: Sequence[Batch],
    dtype: torch.dtype,
    device: torch.device,
    *,
    fp8_base: bool = False,
) -> Callable[[int], MemoryEstimate]:
    """What training `model` on rows like these takes, by how many layers recompute."""
    in_fp8 = frozen_linears(model) if fp8_base else []
    return partial(
        estimate_memory,
        widths=activation_widths(model),
        count=count_parameters(model),
        dtype=dtype,
        row_tokens=max(len(row.input_ids) for row in rows),
        row_targets=max(int((row.labels != IGNORE_INDEX).sum()) for row in rows),
        on_gpu=device.type == "cuda",
        saved_by_fp8=sum(linear.weight.numel() for linear in in_fp8) * (dtype.itemsize - 1),
    )


def layers_asked(
    model: peft.PeftModel, asked: Literal["auto"] | bool, free: int | None, needed: Callable[[int], int]
) -> int:
    """How many layers recompute from the first step. Raises: ConfigError if all shall, and none can."""
    num_layers = len(decoder_layers(model))
    if asked == "auto":
        return fewest_layers(num_layers, free, needed)
    if asked and not num_layers:
        raise ConfigError(
            f"{type(model.get_base_model()).__name__} cannot recompute its activations",
            where="train.activation_checkpointing",
            fix="set it to false; a smaller train.max_tokens saves memory too",
        )
    return num_layers if asked else 0


def fewest_layers(num_layers: int, free: int | None, needed: Callable[[int], int]) -> int:
    """How many layers must recompute for `needed(layers)` bytes to be there; all, if even that is too few.

    Where nobody can tell what is free, none.
    """
    if free is None:
        return 0
    fit = (n for n in range(num_layers + 1) if needed(n) * _MARGIN <= free)
    return next(fit, num_layers)
