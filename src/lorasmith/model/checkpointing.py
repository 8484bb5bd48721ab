"""Activation checkpointing: a decoder layer keeps its input only and is computed again in backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer


def decoder_layers(module: nn.Module) -> list[nn.Module]:
    """Those that transformers lets recompute; none in a foreign model that cannot."""
    return [part for part in module.modules() if isinstance(part, GradientCheckpointingLayer)]


def has_own_dropout(module: nn.Module) -> bool:
    """Whether some class of the base may drop by torch's generator while it trains: OPT and GPT-2 do."""
    configs = (getattr(part, "config", None) for part in module.modules())
    trees = {id(config): config.to_dict() for config in configs if isinstance(config, PretrainedConfig)}
    settings = [item for tree in trees.values() for item in tree.items()]
    rates = [value for key, value in settings if "drop" in key and isinstance(value, float)]
    rates += [part.p for part in module.modules() if isinstance(part, nn.Dropout)]
    return any(rate > 0 for rate in rates)


class RecomputedLayers:
    """The decoder layers of a module, of which the first n recompute; made by `activation_checkpointing`.

    The first, because the backward pass comes to them when the others have freed what they kept. LoRA's
    dropout masks are stateless; torch's generator is kept only for a base that has dropout of its own.
    """

    def __init__(self, module: nn.Module) -> None:
        self._layers = decoder_layers(module)
        self._draws = has_own_dropout(module)

    def __len__(self) -> int:
        """How many could."""
        return len(self._layers)

    def use(self, count: int) -> None:
        assert count <= len(self._layers), (count, len(self._layers))
        for number, layer in enumerate(self._layers):
            assert isinstance(layer, GradientCheckpointingLayer)
            layer.gradient_checkpointing = number < count
            layer._gradient_checkpointing_func = partial(
                checkpoint, use_reentrant=False, preserve_rng_state=self._draws
            )


@contextmanager
def activation_checkpointing(module: nn.Module) -> Iterator[RecomputedLayers]:
    """Within: layers of `module` may be told to recompute; at first none does, and after it none."""
    layers = RecomputedLayers(module)
    try:
        yield layers
    finally:
        layers.use(0)
