"""Qwen3 without thinking: the empty think block belongs to the prompt of every answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from lorasmith.errors import DataError
from lorasmith.families.base import ConfigJson, Family
from lorasmith.families.generic import by_template
from lorasmith.text.template import ChatFormat
from lorasmith.tokenization.tokenizer import Tokenizer
from lorasmith.types import Message, Piece

_START, _END = "<|im_start|>", "<|im_end|>"
_ANSWER_HEAD = "assistant\n<think>\n\n</think>\n\n"


@final
class Qwen3Official(ChatFormat):
    """Source: Qwen3's chat template with enable_thinking=False.

    The template drops the block from answers that others follow, so that no earlier answer's prompt is how
    the conversation goes on, and none could be trained. Here the block stays, in training as in chat.
    """

    joint_text = True

    def __init__(self, tokenizer: Tokenizer, extra_stop_ids: Sequence[int] = ()) -> None:
        self._start = Piece(tokenizer.special_id(_START))
        self._end = tokenizer.special_id(_END)
        super().__init__("official", tokenizer, [self._end, *extra_stop_ids])

    def pieces(self, messages: Sequence[Message], *, for_generation: bool = False) -> list[Piece]:
        """Raises: DataError if an answer to train on thinks; in a prompt its thoughts are left out."""
        if not for_generation:
            _refuse_thinking(messages)
        pieces = [piece for message in messages for piece in self._written(message)]
        return [*pieces, self._start, Piece(_ANSWER_HEAD)] if for_generation else pieces

    def _written(self, message: Message) -> list[Piece]:
        is_answer = message.role == "assistant"
        head = _ANSWER_HEAD if is_answer else f"{message.role}\n"
        content = message.content.rpartition("</think>")[2].lstrip("\n") if is_answer else message.content
        return [
            self._start,
            Piece(head),
            Piece(content, trained=is_answer),
            Piece(self._end, trained=is_answer),
            Piece("\n"),
        ]


def _refuse_thinking(messages: Sequence[Message]) -> None:
    for index, message in enumerate(messages, 1):
        if message.role == "assistant" and "</think>" in message.content:
            raise DataError(
                f"message {index}, an answer, brings its own thinking",
                why="the family qwen3 trains answers without: an empty think block stands in front of each",
                fix="choose --family generic, which follows the template with thinking on",
            )


def _official(tokenizer: Tokenizer, extra_stop_ids: Sequence[int]) -> ChatFormat:
    """Qwen3-2507 has no such switch: its template is followed as it is."""
    has_switch = "enable_thinking" in (tokenizer.chat_template or "")
    return (Qwen3Official if has_switch else by_template)(tokenizer, extra_stop_ids)


def _fits(config: ConfigJson) -> bool:
    return config.get("model_type") in ("qwen3", "qwen3_moe")


FAMILY = Family(
    name="qwen3",
    title="Qwen3, thinking off",
    fits=_fits,
    chat_formats={"official": _official},
    target_modules=None,
    canary=None,
    verified_against="apply_chat_template of transformers with enable_thinking=False",
)
