"""Prompt ids -> answer ids, by transformers' own generate and by our settings alone.

Shapes: B = rows of a batch, T = tokens of its longest prompt, N = new tokens, V = vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import (
    BaseStreamer,
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)

from lorasmith.config import GenerateConfig
from lorasmith.model.model import Model
from lorasmith.model.packed import base_module
from lorasmith.types import Ints


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
    streamer: BaseStreamer | None = None,
    interrupt: StoppingCriteria | None = None,
) -> list[Decoded]:
    """Continue prompts (T_i,) as one left-padded batch, up to a stop id, max_new_tokens or a full context.

    The module's own generation_config has no say. `streamer` (for one row) is given every new id;
    generation ends early at the token where `interrupt` says so.
    """
    base = base_module(model.module)
    ids_BT, mask_BT = _left_pad(prompts, model.tokenizer.pad_id, base.device)
    room_B = [room(model, len(prompt), config) for prompt in prompts]
    padding_B = [ids_BT.shape[1] - len(prompt) for prompt in prompts]
    criteria = [_RowsFull(torch.tensor(room_B, device=base.device) + ids_BT.shape[1])]
    with _evaluating(base), _seeded(config.seed, base.device):
        settings = _settings(config, max(room_B), stop_ids(model), model.tokenizer.pad_id)
        row_BS = _view(base, settings).generate(
            ids_BT,
            generation_config=settings,
            attention_mask=mask_BT,
            logits_processor=LogitsProcessorList(_penalties(config, padding_B)),
            stopping_criteria=StoppingCriteriaList([*criteria, interrupt] if interrupt else criteria),
            streamer=streamer,
        )
    new_BN = row_BS[:, ids_BT.shape[1] :].tolist()
    return [_cut(row, stop_ids(model)) for row in (new[:n] for new, n in zip(new_BN, room_B, strict=True))]


def stop_ids(model: Model) -> list[int]:
    """Every id that ends an answer: the chat format's and those of generation_config.json."""
    own = base_module(model.module).generation_config.eos_token_id
    more = [] if own is None else [own] if isinstance(own, int) else list(own)
    return list(dict.fromkeys([*model.chat_format.stop_ids, *more]))


def context_length(model: Model) -> int | None:
    """Positions that the model has; None for models without a limit."""
    config = base_module(model.module).config.get_text_config()
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "model_max_length")]
    limit = next(filter(None, limits), None)
    return int(limit) if limit else None


def room(model: Model, prompt_length: int, config: GenerateConfig) -> int:
    """How many tokens may follow: max_new_tokens, or what is left of the context."""
    limit = context_length(model)
    return config.max_new_tokens if limit is None else min(config.max_new_tokens, limit - prompt_length)


def _left_pad(prompts: Sequence[Ints], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(len(prompt) for prompt in prompts)
    ids_BT = torch.full((len(prompts), longest), pad_id)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, longest - len(prompt) :] = torch.from_numpy(prompt)
        mask_BT[row, longest - len(prompt) :] = 1
    return ids_BT.to(device), mask_BT.to(device)


def _settings(config: GenerateConfig, max_new_tokens: int, stops: list[int], pad_id: int) -> GenerationConfig:
    sampling: dict[str, Any] = {"do_sample": False}
    if not config.greedy:
        knobs = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
        sampling = {"do_sample": True, **knobs}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=stops or None,
        pad_token_id=pad_id,
        num_beams=1,
        **sampling,
    )


def _view(base: PreTrainedModel, settings: GenerationConfig) -> Any:
    """The same module with another generation_config, which generate would otherwise mix into ours.

    A shallow copy shares all layers and weights, and leaves `base` untouched for other threads.
    """
    view = copy.copy(base)
    view.generation_config = settings
    return view


def _penalties(config: GenerateConfig, padding_B: Sequence[int]) -> list[LogitsProcessor]:
    penalties: list[LogitsProcessor] = []
    if config.repetition_penalty != 1.0:
        penalties.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.no_repeat_ngram_size:
        penalties.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    return [_WithoutPadding(penalty, padding_B) for penalty in penalties]


class _WithoutPadding(LogitsProcessor):  # type: ignore[misc]  # transformers is untyped here
    """A penalty for repeats that does not count padding, whose id is often a stop id, as text."""

    def __init__(self, penalty: LogitsProcessor, padding_B: Sequence[int]) -> None:
        self._penalty, self._padding_B = penalty, padding_B

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = enumerate(self._padding_B)
        return torch.cat([self._penalty(input_ids[b : b + 1, pad:], scores[b : b + 1]) for b, pad in rows])


class _RowsFull(StoppingCriteria):  # type: ignore[misc]
    """Ends each row at its own length: a shorter prompt has more room in the context."""

    def __init__(self, end_B: Tensor) -> None:
        self._end_B = end_B

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return self._end_B <= input_ids.shape[1]


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


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Within: random numbers of the seed. After: torch's generators stand where they stood."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _cut(ids: list[int], stops: Sequence[int]) -> Decoded:
    for length, token_id in enumerate(ids):
        if token_id in stops:
            return Decoded(ids[:length], "stop", length + 1)
    return Decoded(ids, "length", len(ids))
