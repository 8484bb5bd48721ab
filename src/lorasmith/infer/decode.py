"""Prompt ids -> answer ids, a batch at a time, each row as it would be alone.

Our own loop over transformers' modules. Against their generate it computes a shared prompt once, copies no
keys and values for a token, lets finished rows go, and keys random numbers by prompt.
Shapes: B = rows of a batch, R = rows still at work, T = tokens of the longest prompt, N = new tokens,
V = vocabulary, S = stop ids.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from lorasmith.config import GenerateConfig
from lorasmith.infer.continuation import Continuation
from lorasmith.infer.sampling import choose, draws, has_penalty, occurrences
from lorasmith.model.fused import adapters_at_rest
from lorasmith.model.model import Model
from lorasmith.model.packed import base_module
from lorasmith.types import Ints

PASS_COST = 64
"""Tokens that a forward pass must save to pay for itself: below, reading the weights takes longer."""
COMPACT_AT = 0.75
"""Rows that are done leave the batch, which copies its keys and values, when so many are left of it."""


@dataclass(frozen=True)
class Decoded:
    """New ids of one row, without the stop id; `num_tokens` counts it."""

    ids: list[int]
    finish_reason: Literal["stop", "length"]
    num_tokens: int


def decode(
    model: Model,
    prompts: Sequence[Ints],
    config: GenerateConfig,
    *,
    repeats: Sequence[int] | None = None,
    on_token: Callable[[int], None] | None = None,
    interrupted: Callable[[], bool] | None = None,
    pass_cost: int = PASS_COST,
    compact_at: float = COMPACT_AT,
) -> list[Decoded]:
    """Continue prompts (T_i,) up to a stop id, max_new_tokens or a full context, in the order given.

    The module's own generation_config has no say but for its stop ids. `repeats` tells how often each prompt
    was answered before; by default counted within `prompts`. `on_token` is given every new id of the first
    row; generation ends early at the token where `interrupted` says so. No weight is touched.
    """
    base = base_module(model.module)
    rooms = [room(model, len(prompt), config) for prompt in prompts]
    draw_BN = _draws(prompts, rooms, config, repeats)
    with torch.no_grad(), _evaluating(base), adapters_at_rest(base):
        rows = Continuation(base, prompts, model.tokenizer.pad_id, context_length(model))
        batch = _Answers(prompts, rooms, config, draw_BN, stop_ids(model), base.device)
        logits_RV = rows.start(pass_cost)
        while True:
            ids_R = batch.take(logits_RV)
            if on_token is not None:
                on_token(int(ids_R[0]))
            working = batch.num_working()
            if not working or (interrupted is not None and interrupted()):
                return batch.decoded()
            if working < len(ids_R) and working <= compact_at * len(ids_R):
                kept = batch.compact()
                rows.keep(kept)
                ids_R = ids_R[kept]
            logits_RV = rows.step(ids_R)


class _Answers:
    """What the rows of a batch have said, and which of them still speak."""

    def __init__(
        self,
        prompts: Sequence[Ints],
        rooms: Sequence[int],
        config: GenerateConfig,
        draw_BN: Tensor | None,
        stops: Sequence[int],
        device: torch.device,
    ) -> None:
        self._config, self._stops, self._rooms = config, stops, rooms
        self._draw_BN = None if draw_BN is None else draw_BN.to(device)
        self._prompt_columns = max(map(len, prompts))
        said = np.full((len(prompts), self._prompt_columns + max(rooms)), -1)
        for row, prompt in enumerate(prompts):
            said[row, self._prompt_columns - len(prompt) : self._prompt_columns] = prompt
        self._said_BL = torch.from_numpy(said).to(device)
        """Prompt and answer; -1 before, between and behind them."""
        self._room_B = torch.tensor(rooms, device=device)
        self._stop_S = torch.tensor(stops, dtype=torch.long, device=device)
        self._num_new = 0
        self._rows_R = torch.arange(len(prompts), device=device)
        self._is_done_R = torch.zeros(len(prompts), dtype=torch.bool, device=device)

    def take(self, logits_RV: Tensor) -> Tensor:
        """Choose the next ids (R,). Those of rows that are done mean nothing."""
        column, rows = self._prompt_columns + self._num_new, self._rows_R
        draw_R = None if self._draw_BN is None else self._draw_BN[rows, self._num_new]
        history_RL = self._said_BL[rows, :column] if has_penalty(self._config) else None
        ids_R = choose(logits_RV, self._config, draw_R, history_RL)
        self._said_BL[rows, column] = ids_R
        self._num_new += 1
        self._is_done_R |= (ids_R[:, None] == self._stop_S).any(-1) | (self._room_B[rows] <= self._num_new)
        return ids_R

    def num_working(self) -> int:
        return int((~self._is_done_R).sum())

    def compact(self) -> Tensor:
        """Drop the rows that are done; which places are kept, for who else counts by rows."""
        kept_R = (~self._is_done_R).nonzero()[:, 0]
        self._rows_R, self._is_done_R = self._rows_R[kept_R], self._is_done_R[kept_R]
        return kept_R

    def decoded(self) -> list[Decoded]:
        new_BN = self._said_BL[:, self._prompt_columns : self._prompt_columns + self._num_new].tolist()
        return [_cut(new[:room], self._stops) for new, room in zip(new_BN, self._rooms, strict=True)]


def _draws(
    prompts: Sequence[Ints], rooms: Sequence[int], config: GenerateConfig, repeats: Sequence[int] | None
) -> Tensor | None:
    """Uniform numbers (B, N) to choose by; None where nothing is left to chance."""
    if config.greedy:
        return None
    seed = config.seed if config.seed is not None else int(torch.randint(2**62, ()))
    numbers = occurrences(prompts, Counter()) if repeats is None else repeats
    return torch.stack(
        [draws(seed, prompt, number, max(rooms)) for prompt, number in zip(prompts, numbers, strict=True)]
    )


def stop_ids(model: Model) -> list[int]:
    """Every id that ends an answer: the chat format's and those of generation_config.json."""
    own = base_module(model.module).generation_config.eos_token_id
    more = [] if own is None else [own] if isinstance(own, int) else list(own)
    return list(dict.fromkeys([*model.chat_format.stop_ids, *more]))


def context_length(model: Model) -> int | None:
    """Positions that the model has; None for models without a limit."""
    return module_context(model.module)


def module_context(module: nn.Module) -> int | None:
    """The same of a bare module."""
    config = base_module(module).config.get_text_config()
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "model_max_length")]
    limit = next(filter(None, limits), None)
    return int(limit) if limit else None


def room(model: Model, prompt_length: int, config: GenerateConfig) -> int:
    """How many tokens may follow: max_new_tokens, or what is left of the context."""
    limit = context_length(model)
    return config.max_new_tokens if limit is None else min(config.max_new_tokens, limit - prompt_length)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Within: no dropout. After: every part trains again that trained before."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _cut(ids: list[int], stops: Sequence[int]) -> Decoded:
    for length, token_id in enumerate(ids):
        if token_id in stops:
            return Decoded(ids[:length], "stop", length + 1)
    return Decoded(ids, "length", len(ids))
