"""TransNormerLLM (385M, 1B, 7B): base models over Baichuan-1's vocabulary, tuned as Human and Assistant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from lorasmith.families.base import ConfigJson, Family
from lorasmith.text.template import ChatFormat, join_text
from lorasmith.tokenization.sentencepiece_model import SpecialPieces
from lorasmith.tokenization.tokenizer import Tokenizer
from lorasmith.types import Message, Piece

_EOS = "</s>"


@final
class TransNormerOfficial(ChatFormat):
    """Source: OpenNLPLab/TransnormerLLM, fine-tune/train.py: prompt and answer are one text; no BOS.

    Its `instruction` is the system message, left out where it is empty. It has single turns only; further
    ones are written as if each were the first.
    """

    joint_text = True
    role_markers = ("Human:\n", "\nAssistant:\n")

    def __init__(self, tokenizer: Tokenizer, extra_stop_ids: Sequence[int] = ()) -> None:
        self._eos = Piece(tokenizer.special_id(_EOS), trained=True)
        super().__init__("official", tokenizer, [tokenizer.special_id(_EOS), *extra_stop_ids])

    def pieces(self, messages: Sequence[Message], *, for_generation: bool = False) -> list[Piece]:
        pieces = [piece for message in messages for piece in self._written(message)]
        return join_text([*pieces, Piece("Assistant:\n")] if for_generation else pieces)

    def _written(self, message: Message) -> list[Piece]:
        if message.role == "assistant":
            return [Piece("Assistant:\n"), Piece(message.content, trained=True), self._eos]
        if message.role == "user":
            return [Piece(f"Human:\n{message.content}\n")]
        return [Piece(f"{message.content}\n")] if message.content else []


@final
class TransNormerTutorial(ChatFormat):
    """Source: datawhalechina/self-llm, TransNormerLLM 04: ChatML as plain text, prompt and answer apart.

    The persona is the tutorial's own unless the conversation begins with a system message. The tutorial has
    single turns only; further turns are written in the same way. Its pad token is EOS, which ends an answer.
    """

    role_markers = ("<|im_start|>", "<|im_end|>")

    def __init__(self, tokenizer: Tokenizer, extra_stop_ids: Sequence[int] = ()) -> None:
        self._eos = Piece(tokenizer.special_id(_EOS), trained=True)
        super().__init__("tutorial", tokenizer, [tokenizer.special_id(_EOS), *extra_stop_ids])

    def pieces(self, messages: Sequence[Message], *, for_generation: bool = False) -> list[Piece]:
        has_system = bool(messages) and messages[0].role == "system"
        persona = Message("system", "现在你要扮演皇帝身边的女人--甄嬛")
        pieces = [] if has_system else [_asked(persona)]
        answer_head = Piece("<|im_start|>assistant\n")
        for message in messages:
            answer = [answer_head, Piece(message.content, trained=True), self._eos]
            pieces += answer if message.role == "assistant" else [_asked(message)]
        return [*pieces, answer_head] if for_generation else pieces


def _asked(message: Message) -> Piece:
    return Piece(f"<|im_start|>{message.role}\n{message.content}<|im_end|>\n")


def _fits(config: ConfigJson) -> bool:
    is_named = "TransnormerForCausalLM" in (config.get("architectures") or [])
    return config.get("model_type") == "transnormer" or ("model_type" not in config and is_named)


FAMILY = Family(
    name="transnormer",
    title="TransNormerLLM",
    fits=_fits,
    chat_formats={"official": TransNormerOfficial, "tutorial": TransNormerTutorial},
    target_modules=("qkvu_proj", "out_proj", "l1", "l2", "l3"),
    canary="transnormer.json",
    verified_against="ids and labels of the authors' own fine-tune/train.py over Baichuan-1's vocabulary",
    special_pieces=SpecialPieces(reserved=r"<reserved_\d+>|<SEP>|<CLS>"),
)
