"""A batch of prompts and what the model remembers of it: the logits of the next token, step by step.

Prompts are padded on the left. A start that all of them share is computed once.
Shapes: B = rows of a batch, T = columns of the prompts, P = tokens of the shared start, C = columns so far,
N = tokens to come, V = vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from lorasmith.infer.cache import keeps_everything, new_cache, share_prefix
from lorasmith.model.recurrent_cache import RecurrentCache
from lorasmith.model.transnormer import TransNormerForCausalLM
from lorasmith.ops.attention import layout_index
from lorasmith.types import Ints, Layout


class Continuation:
    """Rows that grow by a token at a time; `start`, then `step` for each token, and `keep` to lose rows."""

    def __init__(
        self, base: PreTrainedModel, prompts: Sequence[Ints], pad_id: int, context_length: int | None
    ) -> None:
        self._base = base
        self._takes = frozenset(inspect.signature(base.forward).parameters)
        self._limit = context_length
        self._prompts = prompts
        self._row_BC, self._mask_BC = left_padded(prompts, pad_id, base.device)
        self._padding_B = (self._mask_BC == 0).sum(-1)
        self._is_padded = bool(self._padding_B.any())
        self._cache: Cache | None = None

    def start(self, share_from: int) -> Tensor:
        """Logits (B, V) behind the prompts. A shared start is computed apart where that saves `share_from`
        tokens or more: for less, a forward pass of its own does not pay."""
        if isinstance(self._base, TransNormerForCausalLM):
            return self._start_packed()
        shared = common_prefix(self._prompts)
        self._cache = new_cache(self._base) if self._remembers else None
        saved = shared * (len(self._prompts) - 1)
        if self._cache is None or not keeps_everything(self._cache) or not 0 < share_from <= saved:
            return self._forward(self._row_BC)
        self._share(shared)
        return self._forward(self._row_BC[:, shared:])

    def step(self, ids_B: Tensor) -> Tensor:
        """Logits (B, V) behind one more token in each row."""
        self._row_BC = torch.cat([self._row_BC, ids_B[:, None]], dim=1)
        self._mask_BC = torch.cat([self._mask_BC, torch.ones_like(self._mask_BC[:, :1])], dim=1)
        return self._forward(ids_B[:, None] if self._remembers else self._row_BC)

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the rows, by their places."""
        self._row_BC, self._mask_BC = self._row_BC[rows], self._mask_BC[rows]
        self._padding_B = self._padding_B[rows]
        self._is_padded = self._is_padded and bool(self._padding_B.any())
        if self._cache is not None:
            self._cache.reorder_cache(rows)

    @property
    def _remembers(self) -> bool:
        """Models whose state has another form (Mamba, RWKV) read all tokens again at every step."""
        return "past_key_values" in self._takes

    def _forward(self, ids_BT: Tensor) -> Tensor:
        """Of the last columns of the rows."""
        positions_BT = self._positions(ids_BT.shape[1])
        mask_BC = self._mask_BC if self._is_padded else None
        return self._call(ids_BT, position_ids=positions_BT, attention_mask=mask_BC)

    def _positions(self, columns: int) -> Tensor:
        """Padding and rows that are full stand at positions that the model has."""
        end = self._mask_BC.shape[1]
        columns_T = torch.arange(end - columns, end, device=self._mask_BC.device)
        return (columns_T - self._padding_B[:, None]).clamp(0, self._limit and self._limit - 1)

    def _call(self, ids_BT: Tensor, *, last: int | Tensor = 1, **inputs: Any) -> Tensor:
        asked = {
            **inputs,
            "past_key_values": self._cache,
            "use_cache": self._remembers,
            "logits_to_keep": last,
        }
        outputs = self._base(
            ids_BT, **{key: x for key, x in asked.items() if key in self._takes or key == "layout"}
        )
        if self._remembers:
            self._cache = outputs.past_key_values
        logits: Tensor = outputs.logits
        return logits[:, -1] if isinstance(last, int) else logits[0]

    def _share(self, shared: int) -> None:
        """Fill the cache with the shared start of every row, ending one column before what is left to do."""
        longest = int(np.argmax([len(prompt) for prompt in self._prompts]))
        start_1P = self._row_BC[longest : longest + 1, :shared]
        positions_1P = torch.arange(shared, device=start_1P.device)[None]
        self._call(start_1P, position_ids=positions_1P)
        assert self._cache is not None
        share_prefix(self._cache, self._padding_B)

    def _start_packed(self) -> Tensor:
        """Recurrent layers would decay through padding within a row: one flat row has none, and its segments
        go on from one state of the shared start."""
        shared, device = common_prefix(self._prompts), self._base.device
        parts = [self._prompts[0][:shared]] * (shared > 0) + [prompt[shared:] for prompt in self._prompts]
        starts = np.cumsum([0, *map(len, parts)])
        parents = np.zeros(len(parts), dtype=np.int64)
        parents[: 1 if shared else None] = -1
        first = [0] * (shared > 0) + [shared] * len(self._prompts)
        positions = np.concatenate([np.arange(len(p)) + at for p, at in zip(parts, first, strict=True)])
        layout = Layout(starts, parents, positions)
        ends_B = torch.from_numpy(starts[-len(self._prompts) :] - 1).to(device)
        logits_BV = self._call(
            torch.from_numpy(np.concatenate(parts))[None].to(device),
            last=ends_B,
            position_ids=torch.from_numpy(positions)[None].to(device),
            layout=layout_index(layout, device),
        )
        assert isinstance(self._cache, RecurrentCache)
        self._cache.num_tokens = self._mask_BC.shape[1]
        self._is_padded = False
        if shared:
            self._cache.reorder_cache(torch.arange(1, len(parts), device=device))
        return logits_BV


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
