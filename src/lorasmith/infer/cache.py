"""Keys and values of a batch that is being continued, in buffers with room for tokens to come.

Shapes: B = rows of a batch, K = key/value heads, C = columns (tokens, padding included), P = columns of a
shared prefix, D = head size.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

_ROOM = 64
"""Columns made ahead: the past is copied once in so many tokens, where transformers copies it for each."""


class RoomyLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped here
    """A layer of DynamicCache that writes new columns into free ones; `keys` and `values` are views."""

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """All keys and values, (B, K, C, D), the new ones at the end."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past = self.get_seq_length()
        end = past + key_states.shape[-2]
        if self._buffers is None or self._buffers[0].shape[-2] < end:
            self._buffers = (
                _with_room(self.keys, key_states, past, end + _ROOM),
                _with_room(self.values, value_states, past, end + _ROOM),
            )
        keys, values = self._buffers
        keys[..., past:end, :] = key_states
        values[..., past:end, :] = value_states
        self.keys, self.values = keys[..., :end, :], values[..., :end, :]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows `beam_idx`, of which there may be fewer than before."""
        super().reorder_cache(beam_idx)
        self._buffers = None

    def gather(self, parts: Sequence[RoomyLayer]) -> None:
        """The rows of all parts below each other, as many columns as the widest has; zeros on the left."""
        widest = max(part.get_seq_length() for part in parts)
        self.lazy_initialization(parts[0].keys, parts[0].values)
        self.keys = torch.cat([_widened(part.keys, widest) for part in parts])
        self.values = torch.cat([_widened(part.values, widest) for part in parts])

    def share_prefix(self, padding_B: Tensor) -> None:
        """One row of P columns becomes B rows, each shifted right by its padding and cut to P columns.

        Columns under the padding hold numbers that a mask must hide.
        """
        columns_P = torch.arange(self.keys.shape[-2], device=self.keys.device)
        from_BP = (columns_P - padding_B.to(self.keys.device)[:, None]).clamp_min(0)
        self.keys, self.values = _by_row(self.keys, from_BP), _by_row(self.values, from_BP)
        self._buffers = None


def new_cache(base: PreTrainedModel) -> Cache | None:
    """What transformers' generate would start with, with room; None where the first forward pass makes it."""
    if not base._supports_default_dynamic_cache():
        return None
    cache = DynamicCache(config=base.config.get_text_config(decoder=True))
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def keeps_everything(cache: Cache) -> bool:
    """Whether every layer holds each column of the past: windows and recurrent layers do not."""
    return bool(cache.layers) and all(type(layer) is RoomyLayer for layer in cache.layers)


def shared_prefix(cache: Cache, padding_B: Tensor) -> Cache:
    """See `RoomyLayer.share_prefix`; `cache` itself stays. `keeps_everything` must hold."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in copied.layers:
        layer.share_prefix(padding_B)
    return copied


def gathered(parts: Sequence[Cache]) -> Cache:
    """One cache for the rows of all parts: see `RoomyLayer.gather`. `keeps_everything` must hold."""
    if len(parts) == 1:
        return parts[0]
    whole = copy.copy(parts[0])
    whole.layers = [RoomyLayer() for _ in parts[0].layers]
    for index, layer in enumerate(whole.layers):
        layer.gather([part.layers[index] for part in parts])
    return whole


def _with_room(past: Tensor, new: Tensor, num_past: int, columns: int) -> Tensor:
    buffer = new.new_empty(*new.shape[:-2], columns, new.shape[-1])
    if num_past:
        buffer[..., :num_past, :] = past
    return buffer


def _by_row(x_1KPD: Tensor, from_BP: Tensor) -> Tensor:
    by_row_KBPD: Tensor = x_1KPD[0].index_select(1, from_BP.flatten()).unflatten(1, from_BP.shape)
    return by_row_KBPD.transpose(0, 1)


def _widened(x_BKCD: Tensor, columns: int) -> Tensor:
    return F.pad(x_BKCD, (0, 0, columns - x_BKCD.shape[-2], 0))
