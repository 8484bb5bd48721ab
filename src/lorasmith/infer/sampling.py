"""Logits of a batch -> one id for each row, whose draw depends on the row alone and not on its neighbours.

Shapes: B = rows of a batch, V = vocabulary, L = tokens so far (padding is -1), N = new tokens, W = windows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lorasmith.config import GenerateConfig
from lorasmith.types import Ints

_NEVER = float("-inf")


def occurrences(prompts: Sequence[Ints], seen: Counter[bytes]) -> list[int]:
    """How often each prompt came before, which `seen` remembers: a repeated question has its own draws."""
    numbers = []
    for prompt in prompts:
        key = prompt.tobytes()
        numbers.append(seen[key])
        seen[key] += 1
    return numbers


def draws(seed: int, prompt: Ints, occurrence: int, count: int) -> Tensor:
    """Uniform numbers (N,) of [0, 1), on the CPU; the first of them are the same for any count.

    They hang on the prompt itself and not on its place, so an answer is the same in any batch.
    """
    generator = np.random.default_rng([seed, occurrence, *prompt.tolist()])
    return torch.from_numpy(generator.random(count)).float()


def choose(
    logits_BV: Tensor, config: GenerateConfig, draw_B: Tensor | None, history_BL: Tensor | None
) -> Tensor:
    """The next ids (B,): the likeliest, or with `draw_B` those whose share of the probability holds the draw.

    Penalties come first, then temperature, top-k and top-p, as in transformers' generate. `history_BL` is
    asked for where `config` has a penalty: see `has_penalty`.
    """
    scores_BV = logits_BV.float()
    if history_BL is not None:
        scores_BV = _penalised(scores_BV, config, history_BL)
    if draw_B is None:
        return scores_BV.argmax(-1)
    scores_BV = scores_BV / config.temperature
    size = scores_BV.shape[1]
    top_BK, ids_BK = scores_BV.topk(min(config.top_k or size, size))
    share_BK = top_BK.softmax(-1)
    before_BK = share_BK.cumsum(-1) - share_BK
    share_BK = share_BK.where(before_BK < config.top_p, 0.0)
    until_BK = share_BK.cumsum(-1)
    drawn_B1 = draw_B[:, None] * until_BK[:, -1:]
    place_B = (until_BK <= drawn_B1).sum(-1)
    last_B = (share_BK > 0).sum(-1) - 1  # a draw may be rounded up to 1
    return ids_BK.gather(1, torch.minimum(place_B, last_B)[:, None])[:, 0]


def has_penalty(config: GenerateConfig) -> bool:
    return config.repetition_penalty != 1.0 or config.no_repeat_ngram_size > 0


def _penalised(scores_BV: Tensor, config: GenerateConfig, history_BL: Tensor) -> Tensor:
    if config.repetition_penalty != 1.0:
        scores_BV = _less_of(scores_BV, history_BL, config.repetition_penalty)
    size = config.no_repeat_ngram_size
    return _without_repeats(scores_BV, history_BL, size) if 0 < size <= history_BL.shape[1] else scores_BV


def _less_of(scores_BV: Tensor, history_BL: Tensor, penalty: float) -> Tensor:
    """Keskar et al. 2019, "CTRL" (arXiv 1909.05858), 4.1, with negative scores multiplied."""
    seen_BV = torch.zeros_like(scores_BV, dtype=torch.bool)
    seen_BV = torch.nn.functional.pad(seen_BV, (0, 1))  # padding, -1, marks the column behind the last id
    seen_BV.scatter_(1, history_BL % seen_BV.shape[1], True)
    lowered_BV = torch.where(scores_BV < 0, scores_BV * penalty, scores_BV / penalty)
    return torch.where(seen_BV[:, :-1], lowered_BV, scores_BV)


def _without_repeats(scores_BV: Tensor, history_BL: Tensor, size: int) -> Tensor:
    """No id that would end a run of `size` ids that is there already. Padding equals no id."""
    window_BWS = history_BL.unfold(1, size, 1)
    tail_BS = history_BL[:, history_BL.shape[1] - size + 1 :]
    same_BW = (window_BWS[..., :-1] == tail_BS[:, None]).all(-1) & (window_BWS >= 0).all(-1)
    ceiling_BW = torch.where(same_BW, _NEVER, -_NEVER)
    return scores_BV.scatter_reduce(1, window_BWS[..., -1].clamp_min(0), ceiling_BW, "amin")
