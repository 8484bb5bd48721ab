"""ChatGLM3-6B: role tokens beyond the vocabulary file; the token after an answer is learned with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final, get_args

from lorasmith.families.base import ConfigJson, Family
from lorasmith.text.template import ChatFormat
from lorasmith.tokenization.sentencepiece_model import SpecialPieces
from lorasmith.tokenization.tokenizer import Tokenizer
from lorasmith.types import Message, Piece, Role

_START = ("[gMASK]", "sop")
_APPENDED = (
    *("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
)
_STOPS = ("</s>", "<|user|>", "<|observation|>")
_GLM4_VOCAB_SIZE = 151552


@final
class ChatGLM3Official(ChatFormat):
    """Source: THUDM/ChatGLM3, finetune_hf.py (labels) and the tokenizer's build_chat_input (prompt).

    The line break after a role token has an opening space of its own, and so has the text behind it; both
    belong to what an answer trains. So does the role token that follows it, or EOS at the end.
    """

    def __init__(self, tokenizer: Tokenizer, extra_stop_ids: Sequence[int] = ()) -> None:
        self._start = [Piece(tokenizer.special_id(token)) for token in _START]
        self._roles = {role: tokenizer.special_id(f"<|{role}|>") for role in get_args(Role)}
        self._eos = Piece(tokenizer.special_id("</s>"), trained=True)
        self._line_break = tokenizer.encode("\n")
        super().__init__("official", tokenizer, [*map(tokenizer.special_id, _STOPS), *extra_stop_ids])

    def pieces(self, messages: Sequence[Message], *, for_generation: bool = False) -> list[Piece]:
        pieces = list(self._start)
        is_answer = False
        for message in messages:
            pieces.append(Piece(self._roles[message.role], trained=is_answer))
            is_answer = message.role == "assistant"
            pieces += [Piece(token_id, is_answer) for token_id in self._line_break]
            pieces.append(Piece(message.content, is_answer))
        if for_generation:
            return [*pieces, Piece(self._roles["assistant"])]
        return [*pieces, self._eos] if is_answer else pieces


@final
class ChatGLM3Tutorial(ChatFormat):
    """Source: datawhalechina/self-llm, ChatGLM3 06: the role tags are plain text behind [gMASK] sop.

    The persona is the tutorial's own unless the conversation begins with a system message. The tutorial has
    single turns only; further turns are written in the same way.
    """

    role_markers = ("<|system|>", "<|user|>", "<|assistant|>")

    def __init__(self, tokenizer: Tokenizer, extra_stop_ids: Sequence[int] = ()) -> None:
        self._start = [Piece(tokenizer.special_id(token)) for token in _START]
        self._eos = Piece(tokenizer.special_id("</s>"), trained=True)
        super().__init__("tutorial", tokenizer, [*map(tokenizer.special_id, _STOPS), *extra_stop_ids])

    def pieces(self, messages: Sequence[Message], *, for_generation: bool = False) -> list[Piece]:
        has_system = bool(messages) and messages[0].role == "system"
        persona = [] if has_system else [Piece("<|system|>\n现在你要扮演皇帝身边的女人--甄嬛\n")]
        pieces = [*self._start, *persona]
        for message in messages:
            answer = [Piece("<|assistant|>\n"), Piece(message.content, trained=True), self._eos]
            pieces += answer if message.role == "assistant" else [_asked(message)]
        return [*pieces, Piece("<|assistant|>\n")] if for_generation else pieces


def _asked(message: Message) -> Piece:
    behind = "\n" if message.role == "system" else ""
    return Piece(f"<|{message.role}|>\n{message.content}{behind}")


def _fits(config: ConfigJson) -> bool:
    names = {"ChatGLMModel", "ChatGLMForConditionalGeneration"} & set(config.get("architectures") or [])
    is_chatglm = config.get("model_type") == "chatglm" or ("model_type" not in config and bool(names))
    return is_chatglm and config.get("padded_vocab_size") not in (None, _GLM4_VOCAB_SIZE)


FAMILY = Family(
    name="chatglm3",
    title="ChatGLM3-6B",
    fits=_fits,
    chat_formats={"official": ChatGLM3Official, "tutorial": ChatGLM3Tutorial},
    target_modules=("query_key_value",),
    canary="chatglm3.json",
    verified_against="ids and labels of the authors' own tokenizer, build_chat_input and finetune_hf.py",
    special_pieces=SpecialPieces(appended=_APPENDED),
)
