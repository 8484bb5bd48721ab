"""Small tokenizer.model files, trained here, each with the flags and special pieces of a real one."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import sentencepiece
from tokenizers_factory import CORPUS

RESERVED = ("<SEP>", "<CLS>", "\n", "\t", "<p>", "<reserved_0>", "<reserved_106>", "<reserved_107>")


@cache
def trained(user_defined: tuple[str, ...], add_dummy_prefix: bool, byte_fallback: bool = True) -> bytes:
    """A BPE that normalizes nothing, as all three families have it."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in CORPUS for line in text.split("\n")),
        model_writer=written,
        model_type="bpe",
        vocab_size=(256 if byte_fallback else 0) + len(user_defined) + 160,
        byte_fallback=byte_fallback,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=add_dummy_prefix,
        user_defined_symbols=list(user_defined),
        minloglevel=2,
    )
    return written.getvalue()


def write(directory: Path, user_defined: Sequence[str], *, add_dummy_prefix: bool) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    model = trained(tuple(user_defined), add_dummy_prefix)
    (directory / "tokenizer.model").write_bytes(model)
    config = '{"auto_map": {"AutoTokenizer": ["evil.Tokenizer", null]}, "tokenizer_class": "EvilTokenizer"}'
    (directory / "tokenizer_config.json").write_text(config)
    return directory


def baichuan2_like(directory: Path) -> Path:
    return write(directory, RESERVED, add_dummy_prefix=False)


def chatglm3_like(directory: Path) -> Path:
    return write(directory, (), add_dummy_prefix=True)


def transnormer_like(directory: Path) -> Path:
    return write(directory, RESERVED, add_dummy_prefix=True)
