"""golden.json asked again: does what became of an adapter still say what it said, and if not, by how much?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lorasmith.errors import DataError
from lorasmith.evaluation.golden import Golden, GoldenPrompt, first_logits, greedy_ids, prompt_ids
from lorasmith.exporting.proof import TOLERANCE
from lorasmith.model.dtype import DTYPES
from lorasmith.text.template import ChatFormat
from lorasmith.tokenization.tokenizer import Tokenizer
from lorasmith.types import Message

Outcome = Literal["ok", "moved", "broken"]
EXACT = TOLERANCE[torch.float32]
"""Of the largest logit: the same weights on another machine, or in another layout, part by less."""
_EFFECT = (0.5, 1.5)
"""How much of the adapter's own effect must be there. 0: it is not applied; 2: it is applied twice."""


@dataclass(frozen=True)
class PromptReport:
    """What moved in the answer to one prompt."""

    prompt: str
    """The head of its last message, or of its ids."""
    outcome: Outcome
    ids_equal: bool | None
    """None where there is no chat format, or nothing but ids was asked: those recorded were replayed."""
    logit_difference: float
    """The largest among the logits that were kept."""
    relative: float
    """The same, of the largest logit."""
    top1_equal: bool
    answer_equal: bool
    answer: str
    """What it says now."""


@dataclass(frozen=True)
class Replay:
    """All prompts together."""

    outcome: Outcome
    allowed: float
    """The largest relative difference that rounding the weights to the coarsest dtype on the way explains."""
    effect: float | None
    """Share of the adapter's own effect on the logits that is still there; None if it had none."""
    prompts: tuple[PromptReport, ...]


@dataclass(frozen=True)
class _Asked:
    golden: GoldenPrompt
    ids_equal: bool | None
    logits_V: Tensor
    answer_ids: list[int]


def replay(
    golden: Golden,
    module: nn.Module,
    *,
    chat_format: ChatFormat | None,
    dtypes: Sequence[str],
) -> Replay:
    """Ask `module` the golden prompts, by their recorded ids.

    `dtypes` are those that its weights went through.

    The outcome is "ok" if everything is equal and logits differ by EXACT at most; "broken" if ids differ, a
    logit differs by more than `allowed`, or the adapter's effect is gone; else "moved".
    """
    allowed = max(TOLERANCE[DTYPES[name]] for name in (golden.dtype, *dtypes))
    prompts = [prompt.input_ids for prompt in golden.prompts]
    answers = greedy_ids(module, prompts, max(len(prompt.answer_ids) for prompt in golden.prompts))
    said = zip(golden.prompts, answers, strict=True)
    asked = [_ask(prompt, module, chat_format, answer) for prompt, answer in said]
    tokenizer = chat_format.tokenizer if chat_format else None
    reports = [_report(one, allowed, tokenizer) for one in asked]
    effect = _effect(asked)
    outcomes = {report.outcome for report in reports}
    lost = effect is not None and not _EFFECT[0] <= effect <= _EFFECT[1]
    if lost and max(report.relative for report in reports) > EXACT:
        outcomes.add("broken")
    order: tuple[Outcome, ...] = ("broken", "moved", "ok")
    return Replay(next(o for o in order if o in outcomes), allowed, effect, tuple(reports))


def _ask(
    golden: GoldenPrompt, module: nn.Module, chat_format: ChatFormat | None, answer: list[int]
) -> _Asked:
    logits_V = first_logits(module, golden.input_ids)
    return _Asked(golden, _ids_equal(golden, chat_format), logits_V, answer[: len(golden.answer_ids)])


def _ids_equal(golden: GoldenPrompt, chat_format: ChatFormat | None) -> bool | None:
    if chat_format is None or not golden.messages:
        return None
    messages = [Message(m["role"], m["content"]) for m in golden.messages]  # type: ignore[arg-type]
    try:
        return prompt_ids(chat_format, messages) == list(golden.input_ids)
    except DataError:
        return False


def _report(asked: _Asked, allowed: float, tokenizer: Tokenizer | None) -> PromptReport:
    golden = asked.golden
    difference = _largest_difference(asked)
    relative = difference / max(1e-6, *(abs(logit) for logit in golden.top_logits))
    top1_equal = int(asked.logits_V.argmax()) == golden.top_ids[0]
    answer_equal = asked.answer_ids == list(golden.answer_ids)
    is_asked_so = asked.ids_equal is True or not golden.messages
    same = is_asked_so and relative <= EXACT and top1_equal and answer_equal
    broken = asked.ids_equal is False or not relative <= allowed  # NaN is broken
    text = tokenizer.decode(asked.answer_ids) if tokenizer else " ".join(map(str, asked.answer_ids))
    return PromptReport(
        prompt=_head(golden),
        outcome="broken" if broken else "ok" if same else "moved",
        ids_equal=asked.ids_equal,
        logit_difference=difference,
        relative=relative,
        top1_equal=top1_equal,
        answer_equal=answer_equal,
        answer=text,
    )


def _head(golden: GoldenPrompt) -> str:
    text = golden.messages[-1]["content"] if golden.messages else f"ids {golden.input_ids}"
    return text[:40]


def _largest_difference(asked: _Asked) -> float:
    """Of the kept logits; one that rose from below them moved at least as far as it stands above the last."""
    golden, logits_V = asked.golden, asked.logits_V
    if max(golden.top_ids) >= len(logits_V) or not bool(logits_V.isfinite().all()):
        return math.inf
    kept_K = torch.tensor(golden.top_ids)
    moved = float((logits_V[kept_K] - torch.tensor(golden.top_logits)).abs().max())
    others_V = logits_V.index_fill(0, kept_K, -math.inf)
    return max(moved, float(others_V.max()) - golden.top_logits[-1])


def _effect(asked: Sequence[_Asked]) -> float | None:
    """1 + <moved, effect> / <effect, effect>, over the kept logits of each prompt less their mean."""
    along = length = 0.0
    for one in asked:
        if max(one.golden.top_ids) >= len(one.logits_V):
            return None
        tuned_K, base_K = torch.tensor(one.golden.top_logits), torch.tensor(one.golden.base_logits)
        now_K = one.logits_V[torch.tensor(one.golden.top_ids)]
        effect_K = (tuned_K - base_K).double()
        effect_K = effect_K - effect_K.mean()
        along += float((now_K - tuned_K).double() @ effect_K)
        length += float(effect_K @ effect_K)
    return 1 + along / length if length > 1e-12 else None
