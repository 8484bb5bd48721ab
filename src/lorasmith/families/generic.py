"""Any chat model that transformers knows, by the chat template of its own tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

from lorasmith.errors import FamilyError
from lorasmith.families.base import ConfigJson, Family
from lorasmith.text.jinja import TemplateFormat
from lorasmith.text.template import ChatFormat
from lorasmith.tokenization.fast import FastTokenizer
from lorasmith.tokenization.tokenizer import Tokenizer


def by_template(
    tokenizer: Tokenizer, extra_stop_ids: Sequence[int], *, behind_last_answer: str = ""
) -> ChatFormat:
    """The model directory's own chat template as a chat format; see TemplateFormat.

    Raises: FamilyError if the tokenizer is no tokenizer.json, or its template is missing or unfit.
    """
    if not isinstance(tokenizer, FastTokenizer):
        raise FamilyError(
            "a chat template needs a tokenizer.json",
            why="it is written for a transformers tokenizer",
            fix="choose the --family that this tokenizer belongs to",
        )
    return TemplateFormat(tokenizer, extra_stop_ids, behind_last_answer=behind_last_answer)


_REMOTE_ONLY = {"baichuan", "chatglm", "transnormer"}
"""model_types that transformers does not know: their older relatives (Baichuan-1, ChatGLM2, GLM-4 with remote
code) live as remote code, which is never run."""


def _fits(config: ConfigJson) -> bool:
    known = config.get("model_type") or config.get("architectures")
    return bool(known) and config.get("model_type") not in _REMOTE_ONLY


FAMILY = Family(
    name="generic",
    title="any transformers chat model",
    fits=_fits,
    chat_formats={"official": by_template},
    target_modules=None,
    canary=None,
    verified_against="apply_chat_template of transformers",
)
