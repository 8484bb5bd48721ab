"""GLM-4 for transformers (9B-chat-hf, 0414): its own template, and the role token that ends an answer."""

from __future__ import annotations

from collections.abc import Sequence

from lorasmith.families.base import ConfigJson, Family
from lorasmith.families.generic import by_template
from lorasmith.text.template import ChatFormat
from lorasmith.tokenization.tokenizer import Tokenizer

_STOPS = ("<|user|>", "<|observation|>", "<|endoftext|>")
_VOCAB_SIZE = 151552  # GLM-Edge shares a model_type and has another vocabulary


def _official(tokenizer: Tokenizer, extra_stop_ids: Sequence[int]) -> ChatFormat:
    """Source: THUDM/GLM-4, finetune.py: the token that follows an answer is learned with it, and is <|user|>
    behind the last one. The chat template writes neither that one nor any other end of an answer."""
    stop_ids = [*map(tokenizer.special_id, _STOPS), *extra_stop_ids]
    return by_template(tokenizer, stop_ids, behind_last_answer="<|user|>")


def _fits(config: ConfigJson) -> bool:
    return config.get("model_type") in ("glm", "glm4") and config.get("vocab_size") == _VOCAB_SIZE


FAMILY = Family(
    name="glm4",
    title="GLM-4 (hf)",
    fits=_fits,
    chat_formats={"official": _official},
    target_modules=None,
    canary=None,
    verified_against="apply_chat_template of transformers; the label rule of the authors' finetune.py",
)
