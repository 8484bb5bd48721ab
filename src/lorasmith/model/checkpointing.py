"""Activation checkpointing: each decoder layer keeps its input only and is computed again in backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from lorasmith.errors import ConfigError


@contextmanager
def activation_checkpointing(module: nn.Module, wanted: bool) -> Iterator[None]:
    """Within: the layers of `module` recompute, if wanted. Dropout masks are stateless, so no RNG is kept.

    Raises: ConfigError if the model's layers cannot.
    """
    layers = [m for m in module.modules() if isinstance(m, GradientCheckpointingLayer)] if wanted else []
    if wanted and not layers:
        raise ConfigError(
            f"{type(module).__name__} cannot recompute its activations",
            where="train.activation_checkpointing",
            fix="set it to false; a smaller train.max_tokens saves memory too",
        )
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(
            checkpoint, use_reentrant=False, preserve_rng_state=False
        )
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = False
