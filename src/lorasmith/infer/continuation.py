"""A batch of prompts and what the model remembers of it: the logits of the next token, step by step.

Prompts are padded on the left. A start that all of them share is computed once.
Shapes: B = rows of a batch, T = columns of the prompts, C = columns so far, G = rows that are read together,
V = vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, PreTrainedModel

from lorasmith.attention.layout import layout_index
from lorasmith.infer.cache import gathered, keeps_everything, new_cache, shared_prefix
from lorasmith.native.recurrent_cache import RecurrentCache
from lorasmith.native.transnormer import TransNormerForCausalLM
from lorasmith.types import Ints, Layout


class Continuation:
    """Rows that grow by a token at a time; `start`, then `step` for each token, and `keep` to lose rows."""

    def __init__(
        self, base: PreTrainedModel, prompts: Sequence[Ints], pad_id: int, context_length: int | None
    ) -> None:
        self._base = base
        self._takes = frozenset(inspect.signature(base.forward).parameters) | {"layout"}
        self._limit = context_length
        self._prompts = prompts
        self._row_BC, self._mask_BC = left_padded(prompts, pad_id, base.device)
        self._cache: Cache | None = None
        self._hide_padding = bool((self._mask_BC == 0).any())

    def start(self, pass_cost: int) -> Tensor:
        """Logits (B, V) behind the prompts, in the fewest tokens: a shared start is read once, and rows of
        like length are read together. `pass_cost` is what one more forward pass costs, in tokens."""
        if isinstance(self._base, TransNormerForCausalLM):
            return self._start_packed()
        self._cache = new_cache(self._base) if self._remembers else None
        if self._cache is None or not keeps_everything(self._cache):
            return self._forward(self._row_BC, self._mask_BC, self._hide_padding)
        shared = common_prefix(self._prompts)
        if shared * (len(self._prompts) - 1) < pass_cost:
            shared = 0
        return self._start_in_groups(shared, pass_cost)

    def step(self, ids_B: Tensor) -> Tensor:
        """Logits (B, V) behind one more token in each row."""
        self._row_BC = torch.cat([self._row_BC, ids_B[:, None]], dim=1)
        self._mask_BC = F.pad(self._mask_BC, (0, 1), value=1)
        ids_BT = ids_B[:, None] if self._remembers else self._row_BC
        return self._forward(ids_BT, self._mask_BC, self._hide_padding)

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the rows, by their places."""
        self._row_BC, self._mask_BC = self._row_BC[rows], self._mask_BC[rows]
        self._hide_padding = self._hide_padding and bool((self._mask_BC == 0).any())
        if self._cache is not None:
            self._cache.reorder_cache(rows)

    @property
    def _remembers(self) -> bool:
        """Models whose state has another form (Mamba, RWKV) read all tokens again at every step."""
        return "past_key_values" in self._takes

    def _forward(self, ids_BT: Tensor, mask_BC: Tensor, hide_padding: bool) -> Tensor:
        """Of the last columns of the rows."""
        return self._call(
            ids_BT,
            position_ids=self._positions(mask_BC, ids_BT.shape[1]),
            attention_mask=mask_BC if hide_padding else None,
        )

    def _positions(self, mask_BC: Tensor, columns: int) -> Tensor:
        """Of the last columns. Padding, and rows that are full, stand where the model has a position."""
        end = mask_BC.shape[1]
        columns_T = torch.arange(end - columns, end, device=mask_BC.device)
        padding_B1 = (mask_BC == 0).sum(-1, keepdim=True)
        return (columns_T - padding_B1).clamp(0, self._limit and self._limit - 1)

    def _call(self, ids_BT: Tensor, *, last: int | Tensor = 1, **inputs: Any) -> Tensor:
        asked = {
            **inputs,
            "past_key_values": self._cache,
            "use_cache": self._remembers,
            "logits_to_keep": last,
        }
        outputs = self._base(ids_BT, **{key: value for key, value in asked.items() if key in self._takes})
        if self._remembers:
            self._cache = outputs.past_key_values
        logits: Tensor = outputs.logits
        return logits[:, -1] if isinstance(last, int) else logits[0]

    def _start_in_groups(self, shared: int, pass_cost: int) -> Tensor:
        """A pass for the shared start and one for each group of rows, whose caches are then joined."""
        lengths = [len(prompt) for prompt in self._prompts]
        order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
        prefix = self._read_prefix(order[0], shared) if shared else None
        logits, caches = [], []
        for rows in split_by_length(order, lengths, shared, pass_cost):
            width = lengths[rows[0]]
            ids_GC, mask_GC = self._row_BC[rows, -width:], self._mask_BC[rows, -width:]
            padding_G = (mask_GC == 0).sum(-1)
            self._cache = new_cache(self._base) if prefix is None else shared_prefix(prefix, padding_G)
            logits.append(self._forward(ids_GC[:, shared:], mask_GC, bool(padding_G.any())))
            caches.append(self._cache)
        self._cache = gathered(caches)
        back_B = torch.from_numpy(np.argsort(order)).to(self._base.device)
        if order != sorted(order):
            self._cache.reorder_cache(back_B)
        return torch.cat(logits)[back_B]

    def _read_prefix(self, row: int, shared: int) -> Cache | None:
        """The cache of the first tokens of a row that has no padding."""
        self._cache = new_cache(self._base)
        self._forward(self._row_BC[row : row + 1, :shared], self._mask_BC[row : row + 1, :shared], False)
        return self._cache

    def _start_packed(self) -> Tensor:
        """Recurrent layers would decay through padding within a row: one flat row has none, and its segments
        go on from one state of the shared start."""
        layout, ids = packed_prompts(self._prompts)
        count, device = len(self._prompts), self._base.device
        logits_BV = self._call(
            torch.from_numpy(ids)[None].to(device),
            last=torch.from_numpy(layout.starts[-count:] - 1).to(device),
            position_ids=torch.from_numpy(layout.position_ids)[None].to(device),
            layout=layout_index(layout, device),
        )
        assert isinstance(self._cache, RecurrentCache)
        self._cache.num_tokens = self._mask_BC.shape[1]
        self._hide_padding = False
        if len(layout.parents) > count:
            self._cache.reorder_cache(torch.arange(1, count + 1, device=device))
        return logits_BV


def split_by_length(
    order: Sequence[int], lengths: Sequence[int], shared: int, pass_cost: int
) -> list[list[int]]:
    """`order`, longest first, cut where that reads the fewest tokens: each group pads its rows to its first
    and costs `pass_cost` besides. The cheapest cut of the rows from each place on is found from the end."""
    cheapest, until = [0] * (len(order) + 1), [0] * len(order)
    for begin in reversed(range(len(order))):
        width = lengths[order[begin]] - shared
        costs = [
            pass_cost + width * (end - begin) + cheapest[end] for end in range(begin + 1, len(order) + 1)
        ]
        until[begin] = begin + 1 + int(np.argmin(costs))
        cheapest[begin] = min(costs)
    groups, begin = [], 0
    while begin < len(order):
        groups.append(list(order[begin : until[begin]]))
        begin = until[begin]
    return groups


def packed_prompts(prompts: Sequence[Ints]) -> tuple[Layout, Ints]:
    """Prompts laid end to end behind their shared start, which is a segment of its own where there is one."""
    shared = common_prefix(prompts) if len(prompts) > 1 else 0
    parts = [prompts[0][:shared]] * (shared > 0) + [prompt[shared:] for prompt in prompts]
    first = [0] * (shared > 0) + [shared] * len(prompts)
    parents = np.full(len(parts), 0 if shared else -1)
    parents[0] = -1
    positions = [np.arange(len(part)) + at for part, at in zip(parts, first, strict=True)]
    layout = Layout(np.cumsum([0, *map(len, parts)]), parents, np.concatenate(positions))
    return layout, np.concatenate(parts)


def common_prefix(prompts: Sequence[Ints]) -> int:
    """Tokens that all prompts begin with, leaving at least one of each."""
    length = min(len(prompt) for prompt in prompts) - 1
    stacked = np.stack([prompt[:length] for prompt in prompts])
    differ = np.flatnonzero((stacked != stacked[0]).any(0))
    return int(differ[0]) if len(differ) else length


def left_padded(prompts: Sequence[Ints], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids (B, T), and 1 where they are no padding."""
    longest = max(len(prompt) for prompt in prompts)
    ids_BT = torch.full((len(prompts), longest), pad_id)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, longest - len(prompt) :] = torch.from_numpy(prompt)
        mask_BT[row, longest - len(prompt) :] = 1
    return ids_BT.to(device), mask_BT.to(device)
