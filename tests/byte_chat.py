"""A byte tokenizer, a chat format over it, and tiny models that speak it: small, but real in every part."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lorasmith.config import ModelConfig
from lorasmith.families.base import Family
from lorasmith.model.model import Model
from lorasmith.native.transnormer import TransNormerConfig, TransNormerForCausalLM
from lorasmith.text.template import ChatFormat
from lorasmith.tokenization.tokenizer import Tokenizer
from lorasmith.types import Message, Piece

SPECIAL_TOKENS = {"<system>": 256, "<user>": 257, "<assistant>": 258, "<end>": 259, "<eos>": 260}
VOCAB_SIZE = 264


class ByteTokenizer(Tokenizer):
    """Every byte of UTF-8 is an id; padding is <eos>, as in many chat models."""

    chat_template = None

    @property
    def vocab_size(self) -> int:
        return VOCAB_SIZE

    @property
    def special_tokens(self) -> Mapping[str, int]:
        return SPECIAL_TOKENS

    @property
    def eos_id(self) -> int | None:
        return SPECIAL_TOKENS["<eos>"]

    @property
    def pad_id(self) -> int:
        return SPECIAL_TOKENS["<eos>"]

    def encode_all(self, texts: Sequence[str], *, starts: Sequence[bool] | None = None) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return bytes(token_id for token_id in ids if token_id < 256).decode(errors="replace")

    def lost(self, texts: Sequence[str], encoded: Sequence[Sequence[int]]) -> list[int]:
        return []

    def stream(self, ids: Iterator[int]) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token_id in ids:
            if token_id < 256 and (text := decoder.decode(bytes([token_id]))):
                yield text
        if rest := decoder.decode(b"", final=True):
            yield rest


class ByteFormat(ChatFormat):
    """<user>text<assistant>text<end>"""

    def pieces(self, messages: Sequence[Message], *, for_generation: bool = False) -> list[Piece]:
        pieces: list[Piece] = []
        for message in messages:
            trained = message.role == "assistant"
            pieces += [Piece(SPECIAL_TOKENS[f"<{message.role}>"]), Piece(message.content, trained)]
            pieces += [Piece(SPECIAL_TOKENS["<end>"], trained=True)] if trained else []
        return [*pieces, Piece(SPECIAL_TOKENS["<assistant>"])] if for_generation else pieces


def byte_model(
    module: PreTrainedModel, *, stops: Sequence[str] = ("<end>",), system: str | None = None
) -> Model:
    tokenizer = ByteTokenizer()
    chat_format = ByteFormat("official", tokenizer, [SPECIAL_TOKENS[name] for name in stops])
    family = Family(
        "byte", "Byte", lambda _: True, {"official": lambda _: chat_format}, None, None, "nothing"
    )
    module.generation_config.eos_token_id = None
    return Model(
        module=module,
        tokenizer=tokenizer,
        family=family,
        chat_format=chat_format,
        directory=Path("byte"),
        config=ModelConfig(path="byte"),
        system=system,
    )


def random_llama(
    *, max_positions: int = 256, vocab_size: int = VOCAB_SIZE, seed: int = 0
) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_positions,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def random_transnormer(*, max_positions: int = 256, seed: int = 0) -> TransNormerForCausalLM:
    config = TransNormerConfig(
        vocab_size=VOCAB_SIZE,
        decoder_embed_dim=32,
        hidden_dim=32,
        glu_dim=64,
        decoder_layers=2,
        decoder_attention_heads=4,
        model_max_length=max_positions,
        init_std=0.3,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TransNormerForCausalLM(config).eval()


RANDOM_MODULES = {"llama": random_llama, "transnormer": random_transnormer}


def speaking_llama(ids: Sequence[int], *, max_positions: int = 100_000) -> LlamaForCausalLM:
    """Says `ids` behind <assistant>: its head is a table of next ids, so only the last may be a repeat."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=VOCAB_SIZE,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=max_positions,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    module = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        layer = module.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        module.model.embed_tokens.weight.copy_(torch.eye(VOCAB_SIZE))
        module.lm_head.weight.zero_()
        for current, following in pairwise([SPECIAL_TOKENS["<assistant>"], *ids]):
            module.lm_head.weight[following, current] = 10.0
    return module


def speaking_model(text: str, **options: object) -> Model:
    """A model that answers everything with `text`, whose bytes must all differ."""
    return byte_model(speaking_llama([*text.encode(), SPECIAL_TOKENS["<end>"]]), **options)  # type: ignore[arg-type]


def endless_model() -> Model:
    """A model that answers everything with abababab..."""
    return byte_model(speaking_llama([*b"aba"]))
