"""DeepSeek-LLM (7B, 67B) chat: plain-text role markers between two control tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from lorasmith.families.base import ConfigJson, Family
from lorasmith.text.template import ChatFormat
from lorasmith.tokenization.tokenizer import Tokenizer
from lorasmith.types import Message, Piece

_BOS, _EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
_ROLE_MARKERS = ("\n\nUser:", "\n\nAssistant:")


@final
class DeepSeekOfficial(ChatFormat):
    """Source: the chat_template of deepseek-ai/deepseek-llm-7b-chat; the answer owns the space before it."""

    role_markers = _ROLE_MARKERS

    def __init__(self, tokenizer: Tokenizer, extra_stop_ids: Sequence[int] = ()) -> None:
        self._bos = Piece(tokenizer.special_id(_BOS))
        self._eos = Piece(tokenizer.special_id(_EOS), trained=True)
        super().__init__("official", tokenizer, [tokenizer.special_id(_EOS), *extra_stop_ids])

    def pieces(self, messages: Sequence[Message], *, for_generation: bool = False) -> list[Piece]:
        pieces = [self._bos]
        for message in messages:
            pieces += [_asked(message)] if message.role != "assistant" else self._answered(message.content)
        return [*pieces, Piece("Assistant:")] if for_generation else pieces

    def read_answer(self, text: str) -> str:
        return text.removeprefix(" ")

    def _answered(self, content: str) -> list[Piece]:
        return [Piece("Assistant:"), Piece(f" {content}", trained=True), self._eos]


@final
class DeepSeekTutorial(ChatFormat):
    """Source: datawhalechina/self-llm, DeepSeek 04: no BOS, "Assistant:" is trained, and so is a second EOS.

    The tutorial has single turns only; further turns end in one EOS, the conversation in two.
    """

    role_markers = _ROLE_MARKERS

    def __init__(self, tokenizer: Tokenizer, extra_stop_ids: Sequence[int] = ()) -> None:
        self._eos = Piece(tokenizer.special_id(_EOS), trained=True)
        super().__init__("tutorial", tokenizer, [tokenizer.special_id(_EOS), *extra_stop_ids])

    def pieces(self, messages: Sequence[Message], *, for_generation: bool = False) -> list[Piece]:
        pieces: list[Piece] = []
        for message in messages:
            is_answer = message.role == "assistant"
            answer = [Piece(f"Assistant: {message.content}", trained=True), self._eos]
            pieces += answer if is_answer else [_asked(message)]
        if for_generation:
            return [*pieces, Piece("Assistant:", trained=True)]
        return [*pieces, self._eos] if messages[-1].role == "assistant" else pieces

    def read_answer(self, text: str) -> str:
        return text.removeprefix(" ")


def _asked(message: Message) -> Piece:
    marker = "User: " if message.role == "user" else ""
    return Piece(f"{marker}{message.content}\n\n")


def _fits(config: ConfigJson) -> bool:
    ids = (config.get("vocab_size"), config.get("bos_token_id"), config.get("eos_token_id"))
    return config.get("model_type") == "llama" and ids == (102400, 100000, 100001)


FAMILY = Family(
    name="deepseek",
    title="DeepSeek-LLM-chat",
    fits=_fits,
    chat_formats={"official": DeepSeekOfficial, "tutorial": DeepSeekTutorial},
    target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    canary="deepseek.json",
    verified_against="the vocabulary of llama.cpp's deepseek-llm test vectors",
)
