"""Meta-Llama-3-Instruct (8B, 70B). Later Llamas write other headers: they go by their own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from lorasmith.families.base import ConfigJson, Family
from lorasmith.text.template import ChatFormat
from lorasmith.tokenization.tokenizer import Tokenizer
from lorasmith.types import Message, Piece

_VOCAB_SIZE = 128256


@final
class Llama3Official(ChatFormat):
    """Source: meta-llama/llama3, ChatFormat: contents are stripped. Headers are not trained."""

    def __init__(self, tokenizer: Tokenizer, extra_stop_ids: Sequence[int] = ()) -> None:
        self._turns = _Turns(tokenizer)
        self._bos = Piece(tokenizer.special_id("<|begin_of_text|>"))
        super().__init__("official", tokenizer, [*self._turns.stop_ids, *extra_stop_ids])

    def pieces(self, messages: Sequence[Message], *, for_generation: bool = False) -> list[Piece]:
        turns = [p for m in messages for p in self._turns.write(m.role, m.content.strip())]
        return [self._bos, *turns, *(self._turns.open("assistant") if for_generation else [])]


@final
class Llama3Tutorial(ChatFormat):
    """Source: datawhalechina/self-llm, LLaMA3 LoRA notebook: no BOS, nothing stripped, a second end token.

    The tutorial has single turns only; further turns and a system message are written in the same way.
    """

    def __init__(self, tokenizer: Tokenizer, extra_stop_ids: Sequence[int] = ()) -> None:
        self._turns = _Turns(tokenizer)
        self._pad = Piece(tokenizer.special_id("<|end_of_text|>"), trained=True)
        super().__init__("tutorial", tokenizer, [*self._turns.stop_ids, *extra_stop_ids])

    def pieces(self, messages: Sequence[Message], *, for_generation: bool = False) -> list[Piece]:
        turns = [p for m in messages for p in self._turns.write(m.role, m.content)]
        if for_generation:
            return turns + self._turns.open("assistant")
        return [*turns, self._pad] if messages[-1].role == "assistant" else turns


class _Turns:
    """<|start_header_id|>role<|end_header_id|>\\n\\ncontent<|eot_id|>"""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._header_start = Piece(tokenizer.special_id("<|start_header_id|>"))
        self._header_end = Piece(tokenizer.special_id("<|end_header_id|>"))
        self._end = tokenizer.special_id("<|eot_id|>")
        self.stop_ids = (self._end, tokenizer.special_id("<|end_of_text|>"))

    def open(self, role: str) -> list[Piece]:
        return [self._header_start, Piece(role), self._header_end, Piece("\n\n")]

    def write(self, role: str, content: str) -> list[Piece]:
        trained = role == "assistant"
        return [*self.open(role), Piece(content, trained), Piece(self._end, trained)]


def _fits(config: ConfigJson) -> bool:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    is_later_llama = "llama3" in (rope.get("rope_type"), rope.get("type"))
    is_llama = config.get("model_type") == "llama" and config.get("vocab_size") == _VOCAB_SIZE
    return is_llama and not is_later_llama


FAMILY = Family(
    name="llama3",
    title="Llama-3-Instruct",
    fits=_fits,
    chat_formats={"official": Llama3Official, "tutorial": Llama3Tutorial},
    target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    canary="llama3.json",
    verified_against="ids of meta-llama/llama3's own ChatFormat and tokenizer.model",
)
