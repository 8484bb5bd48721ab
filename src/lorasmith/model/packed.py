"""Flat rows through a causal language model as transformers wrote it.

Shapes: T = tokens of the flat row, N = positions that have a label, D = hidden size, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lorasmith.adapters.dropout import DropoutClock
from lorasmith.attention.layout import LAYOUT_ATTENTION, LayoutIndex, layout_attention_interface, layout_index
from lorasmith.model.checkpointing import has_own_dropout
from lorasmith.model.fused import Forward, fused_ops, replaced_forward
from lorasmith.native.norm_head import NormHead
from lorasmith.ops.cross_entropy import cross_entropy_sum, linear_cross_entropy
from lorasmith.ops.dropout import dropout_key
from lorasmith.ops.gemm import bound_product_stores
from lorasmith.ops.transfer import on_device
from lorasmith.types import IGNORE_INDEX, Batch, Layout

_POSITION_WISE = (
    "mlp",
    "channel_mixer",
    "self_attn.q_proj",
    "self_attn.o_proj",
    "self_attention.dense",
    "token_mixer.out_proj",
)
"""The field's names for what, in the last layer, only reads and writes a token's own position."""

_TILE = 128
"""Rows of a tile of cuBLAS's products and of FlexAttention's blocks: a partly filled one costs a full one."""


@dataclass(frozen=True)
class DeviceBatch:
    """A Batch as tensors; only positions with a label are kept for the head."""

    input_ids: Tensor  # (1, T)
    position_ids: Tensor  # (1, T)
    rows: Tensor  # (N,) the positions that have a label
    labels: Tensor  # (N,)
    weights: Tensor  # (N,)
    token_numbers: Tensor  # (T,)
    first_token: int
    """The number of the row's first token in its step."""
    layout: LayoutIndex


def to_device(batch: Batch, device: torch.device) -> DeviceBatch:
    rows = np.flatnonzero(batch.labels != IGNORE_INDEX)
    return DeviceBatch(
        input_ids=on_device(batch.input_ids, device)[None],
        position_ids=on_device(batch.layout.position_ids, device)[None],
        rows=on_device(rows, device),
        labels=on_device(batch.labels[rows], device),
        weights=on_device(batch.weights[rows], device),
        token_numbers=on_device(batch.token_numbers, device),
        first_token=int(batch.token_numbers[0]) if len(batch.token_numbers) else 0,
        layout=layout_index(batch.layout, device),
    )


def length_on_gpu(tokens: int, row_length: int | None) -> int:
    """What a row of so many tokens is padded to: whole tiles, of `row_length` at least where that is asked.

    A conversation that is longer has a row of its own.
    """
    least = max(tokens, row_length or 0)
    return least + -least % _TILE


def padded(batch: Batch, length: int) -> Batch:
    """The row with a segment at its end that nobody sees, without label and weight, so that it has `length`.

    Its positions are 0, which a model with learned ones has, however short its context. Loss, gradients and
    the other tokens' dropout masks stay as they were.
    """
    layout, missing = batch.layout, length - len(batch.input_ids)
    if missing == 0:
        return batch
    positions = np.pad(layout.position_ids, (0, missing))
    starts = np.append(layout.starts, layout.starts[-1] + missing)
    return Batch(
        input_ids=np.pad(batch.input_ids, (0, missing)),
        labels=np.pad(batch.labels, (0, missing), constant_values=IGNORE_INDEX),
        weights=np.pad(batch.weights, (0, missing)),
        layout=Layout(starts, np.append(layout.parents, -1), positions),
        token_numbers=np.pad(batch.token_numbers, (0, missing)),
    )


def as_computed(batch: Batch, device: torch.device, row_length: int | None) -> Batch:
    """The row as a device computes it: on a GPU padded, so that few lengths occur; see `length_on_gpu`."""
    if device.type != "cuda":
        return batch
    return padded(batch, length_on_gpu(len(batch.input_ids), row_length))


def base_module(module: nn.Module) -> PreTrainedModel:
    """The transformers module, under peft or not."""
    base = module.get_base_model() if isinstance(module, peft.PeftModel) else module
    assert isinstance(base, PreTrainedModel)
    return base


def takes_layout(module: nn.Module) -> bool:
    """Whether every layer goes by the Layout: plain softmax attention behind transformers'
    AttentionInterface, or our own linear attention. Tried on this very model, unless it has no weights yet.

    Others (sliding windows, soft caps, masks of their own, foreign recurrent layers) take rows of one
    conversation, so nothing leaks: a Loader that is not `packed` makes them.
    """
    base = base_module(module)
    if not base._supports_attention_backend or not _plain_attention(base.config.get_text_config()):
        return False
    if next(base.parameters()).is_meta:
        return True
    if base not in _TRIED:
        _TRIED[base] = _goes_by_layout(base)
    return _TRIED[base]


_TRIED: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
"""By model, since weights that are zero can hide a mask; a trial costs three small forward passes."""


@torch.no_grad()
def _goes_by_layout(base: PreTrainedModel) -> bool:
    """Whether two conversations in one row give what each gives alone."""
    parts, ids_T = (3, 4), torch.arange(7, device=base.device) % base.config.get_text_config().vocab_size
    layout = Layout(np.array([0, 3, 7]), np.array([-1, -1]), np.concatenate([np.arange(n) for n in parts]))
    positions_1T = torch.from_numpy(layout.position_ids)[None].to(base.device)
    was_training = [part for part in base.modules() if part.training]
    base.eval()
    try:
        alone = [base.base_model(input_ids=ids[None], use_cache=False)[0] for ids in ids_T.split(parts)]
        with _layout_attention(base):
            together_1TD = base.base_model(
                input_ids=ids_T[None],
                position_ids=positions_1T,
                layout=layout_index(layout, base.device),
                use_cache=False,
            )[0]
    except (TypeError, RuntimeError, AssertionError):  # a class that passes no layout on, or asks for more
        return False
    finally:
        for part in was_training:
            part.training = True
    apart_1TD = torch.cat(alone, dim=1)
    tolerance = {8: 1e-8, 4: 1e-4}.get(apart_1TD.dtype.itemsize, 0.1)  # of many layers' rounding
    return bool((together_1TD - apart_1TD).abs().max() <= tolerance * apart_1TD.abs().max())


def _plain_attention(config: PretrainedConfig) -> bool:
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
    capped = getattr(config, "attn_logit_softcapping", None)
    return kinds == {"full_attention"} and not windowed and not capped


class PackedModule:
    """A module that computes losses of flat rows; made by `packed`, within which alone it works."""

    def __init__(self, module: nn.Module, clock: DropoutClock) -> None:
        self.module, self.clock = module, clock
        self.clock.token_numbers = None  # the probes of this module count from 0
        self.by_layout = takes_layout(module)
        self.base = base_module(module)
        self.row_length: int | None = None
        """That every row has on a GPU, where one is asked; see `length_on_gpu`."""
        self._head = _plain_head(self.base)
        self._rows: Tensor | None = None
        self._labelled: Tensor | None = None
        self._draws = has_own_dropout(self.base)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def to_device(self, batch: Batch) -> DeviceBatch:
        return to_device(self.as_computed(batch), self.device)

    def as_computed(self, batch: Batch) -> Batch:
        """The row as this module computes it."""
        return as_computed(batch, self.device, self.row_length) if self.by_layout else batch

    def loss_sum(self, batch: DeviceBatch) -> Tensor:
        """Sum over the labelled positions of weight * -log p(label), a scalar; logits are never all there."""
        if self._head is None or not self.by_layout:
            return cross_entropy_sum(self.logits(batch), batch.labels, batch.weights)
        self._begin(batch, batch.rows)
        hidden_1TD = self.base.base_model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            layout=batch.layout,
            use_cache=False,
        ).last_hidden_state
        hidden_ND = hidden_1TD[0].index_select(0, batch.rows)
        return _head_loss(self._head, hidden_ND, batch)

    def logits(self, batch: DeviceBatch) -> Tensor:
        """Logits (N, V) of the positions that have a label, in the order of `batch.rows`."""
        self._begin(batch, None)
        if not self.by_layout:
            assert len(batch.layout.layout.parents) == 1, "such a model computes one conversation at a time"
            logits_1TV: Tensor = self.module(input_ids=batch.input_ids, use_cache=False).logits
            return logits_1TV[0, batch.rows]
        logits_1NV: Tensor = self.module(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            layout=batch.layout,
            logits_to_keep=batch.rows,
            use_cache=False,
        ).logits
        return logits_1NV[0]

    def on_rows(self, part: nn.Module) -> Forward:
        """A forward for a position-wise part of the last layer: what feeds no label is left out.

        The other positions read zeros, in forward as in backward; nobody looks at them.
        """
        own: Forward = part.forward

        def forward(x_1TD: Tensor) -> Tensor:
            rows, numbers = self._rows, self.clock.token_numbers
            if rows is None:
                whole_1TD: Tensor = own(x_1TD)
                return whole_1TD
            self.clock.token_numbers = None if numbers is None else numbers[rows]
            try:
                out_1ND: Tensor = own(x_1TD.index_select(1, rows))
            finally:
                self.clock.token_numbers = numbers
            spread_1TD = out_1ND.new_zeros(1, x_1TD.shape[1], out_1ND.shape[2])
            return spread_1TD.index_copy(1, rows, out_1ND)

        return forward

    def on_labels(self, head: nn.Module) -> Forward:
        """A forward for an adapted head, which reads the labelled positions: its dropout has their masks."""
        own: Forward = head.forward

        def forward(x_1ND: Tensor) -> Tensor:
            rows, numbers = self._labelled, self.clock.token_numbers
            if rows is None or numbers is None or x_1ND.shape[1] == len(numbers):
                whole: Tensor = own(x_1ND)
                return whole
            self.clock.token_numbers = numbers[rows]
            try:
                logits_1NV: Tensor = own(x_1ND)
            finally:
                self.clock.token_numbers = numbers
            return logits_1NV

        return forward

    def _begin(self, batch: DeviceBatch, rows: Tensor | None) -> None:
        self.clock.token_numbers, self._rows, self._labelled = batch.token_numbers, rows, batch.rows
        if self._draws:  # a base's own dropout is of torch's generator: the same masks after a resume
            row = f"base from {batch.first_token}"
            torch.manual_seed(dropout_key(self.clock.seed, self.clock.step, row)[0])


@contextmanager
def packed(module: nn.Module, clock: DropoutClock | None = None) -> Iterator[PackedModule]:
    """Within: flat rows may be computed. After: the module generates as before.

    `clock` is the one that the module's dropout reads; a module in eval mode needs none.
    """
    bound_product_stores()  # for a module that was not loaded by us
    with ExitStack() as stack:
        if has_own_dropout(base_module(module)):
            device = base_module(module).device
            stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        rows = PackedModule(module, clock or DropoutClock(seed=0))
        if not rows.by_layout:
            yield rows
            return
        stack.enter_context(_layout_attention(rows.base))
        stack.enter_context(fused_ops(rows.base))
        head = rows.base.get_output_embeddings()
        if isinstance(head, LoraLayer):
            stack.enter_context(replaced_forward(head, rows.on_labels(head)))
        for part in _last_position_wise(rows.base):
            stack.enter_context(replaced_forward(part, rows.on_rows(part)))
        yield rows


@contextmanager
def _layout_attention(base: PreTrainedModel) -> Iterator[None]:
    before = base.config._attn_implementation
    AttentionInterface.register(LAYOUT_ATTENTION, layout_attention_interface)
    base.set_attn_implementation(LAYOUT_ATTENTION)
    try:
        yield
    finally:
        base.set_attn_implementation(before)


def _last_position_wise(base: PreTrainedModel) -> list[nn.Module]:
    layers = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    parts = dict(layers[-1].named_modules()) if layers else {}
    return [parts[name] for name in _POSITION_WISE if name in parts]


@torch.no_grad()
def _plain_head(base: PreTrainedModel) -> nn.Linear | NormHead | None:
    """The head, if it is neither adapted nor followed by a scale or a soft cap: tried on this model."""
    head = base.get_output_embeddings()
    if type(head) not in (nn.Linear, NormHead):
        return None
    ids = torch.arange(4, device=head.weight.device)[None]
    hidden_1TD = base.base_model(input_ids=ids, use_cache=False).last_hidden_state
    logits_1TV = base(input_ids=ids, use_cache=False).logits
    return head if torch.allclose(head(hidden_1TD).to(logits_1TV.dtype), logits_1TV, rtol=1e-3) else None


def _head_loss(head: nn.Linear | NormHead, hidden_ND: Tensor, batch: DeviceBatch) -> Tensor:
    if isinstance(head, NormHead):
        return linear_cross_entropy(
            hidden_ND, head.weight, batch.labels, batch.weights, weight_scale=head.inverse_norms_V()
        )
    return linear_cross_entropy(hidden_ND, head.weight, batch.labels, batch.weights, bias=head.bias)
