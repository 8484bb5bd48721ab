"""Baichuan2-Chat (7B, 13B): two role tokens without separators; EOS is learned where the next turn begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from lorasmith.families.base import ConfigJson, Family
from lorasmith.text.template import ChatFormat
from lorasmith.tokenization.sentencepiece_model import SpecialPieces
from lorasmith.tokenization.tokenizer import Tokenizer
from lorasmith.types import Message, Piece

_USER, _ASSISTANT, _EOS = "<reserved_106>", "<reserved_107>", "</s>"
_BAICHUAN1_VOCAB_SIZE = 64000


@final
class Baichuan2Official(ChatFormat):
    """Source: baichuan-inc/Baichuan2, fine-tune.py (labels) and the chat model's build_chat_input (prompt).

    Nothing in the text ends an answer but the conversation's own EOS: inside it, the role token that follows
    an answer stands in the input, and EOS is its label. fine-tune.py knows no system message; it is written
    in front, as build_chat_input does, and not trained.
    """

    def __init__(self, tokenizer: Tokenizer, extra_stop_ids: Sequence[int] = ()) -> None:
        self._user, self._assistant, self._eos = map(tokenizer.special_id, (_USER, _ASSISTANT, _EOS))
        super().__init__("official", tokenizer, [self._eos, *extra_stop_ids])

    def pieces(self, messages: Sequence[Message], *, for_generation: bool = False) -> list[Piece]:
        pieces: list[Piece] = []
        ends_answer: int | None = None
        for message in messages:
            pieces += self._written(message, ends_answer)
            ends_answer = self._eos if message.role == "assistant" else None
        if for_generation:
            return [*pieces, Piece(self._assistant)]
        return [*pieces, Piece(self._eos, trained=True)] if ends_answer is not None else pieces

    def _written(self, message: Message, ends_answer: int | None) -> list[Piece]:
        text = Piece(message.content, trained=message.role == "assistant")
        if message.role == "system":
            return [text]
        marker = self._user if message.role == "user" else self._assistant
        return [Piece(marker, target=ends_answer), text]


@final
class Baichuan2Tutorial(ChatFormat):
    """Source: datawhalechina/self-llm, Baichuan2 04: ChatML, which is plain text to this vocabulary.

    The persona is the tutorial's own unless the conversation begins with a system message. The tutorial has
    single turns only; further turns are written in the same way.
    """

    role_markers = ("<|im_start|>", "<|im_end|>", "\n\nAssistant:")

    def __init__(self, tokenizer: Tokenizer, extra_stop_ids: Sequence[int] = ()) -> None:
        self._eos = Piece(tokenizer.special_id(_EOS), trained=True)
        super().__init__("tutorial", tokenizer, [tokenizer.special_id(_EOS), *extra_stop_ids])

    def pieces(self, messages: Sequence[Message], *, for_generation: bool = False) -> list[Piece]:
        has_system = bool(messages) and messages[0].role == "system"
        pieces = [] if has_system else [_asked("system", "现在你要扮演皇帝身边的女人--甄嬛.")]
        for message in messages:
            is_answer = message.role == "assistant"
            answer = [Piece("\n\nAssistant: "), Piece(message.content, trained=True), self._eos]
            pieces += answer if is_answer else [_asked(message.role, message.content)]
        return [*pieces, Piece("\n\nAssistant: ")] if for_generation else pieces


def _asked(role: str, content: str) -> Piece:
    between = "\n" if role == "system" else ""
    return Piece(f"<|im_start|>{role}\n{content}<|im_end|>{between}")


def _fits(config: ConfigJson) -> bool:
    names = {"BaichuanForCausalLM", "BaiChuanForCausalLM"} & set(config.get("architectures") or [])
    is_baichuan = config.get("model_type") == "baichuan" or ("model_type" not in config and bool(names))
    return is_baichuan and config.get("vocab_size") != _BAICHUAN1_VOCAB_SIZE


FAMILY = Family(
    name="baichuan2",
    title="Baichuan2-Chat",
    fits=_fits,
    chat_formats={"official": Baichuan2Official, "tutorial": Baichuan2Tutorial},
    target_modules=("W_pack", "o_proj", "gate_proj", "up_proj", "down_proj"),
    canary="baichuan2.json",
    verified_against="ids and labels of the authors' own tokenizer, build_chat_input and fine-tune.py",
    special_pieces=SpecialPieces(reserved=r"<reserved_\d+>|<SEP>|<CLS>"),
)
