"""Random texts full of traps, and tiny random conversations of token ids."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import numpy as np

from lorasmith.tokenization.tokenizer import Tokenizer
from lorasmith.types import IGNORE_INDEX, Example, Ints

_LETTERS = (
    "Hello",
    " world",
    "你好",
    "臣妾做不到啊",
    "🌸",
    "👩‍👩‍👧",
    "é",
    "e\u0301",
    "ø",
    "ü",
    "ÿ",
    "ß",
    "龘",
)
_SPACES = ("\n", "\n\n", "\r\n", "\t", " ", "  ", "   ", "\u200b", "\x00")
_MARKS = ("1723", "3.14", "<|", "|>", "<", "'", '"', "\\n", "{{", "%}", "[INST]", "</think>", "User:")
_TURNS = ("\n\nAssistant:", "Human:\n", "<|im_start|>", "<|user|>", "<reserved_106>", "</s>", "<unk>")
_INTERNAL = ("\ufdd0", "\ufdd1", "\ufffd", "qz0q", "qzz1q", "▁", "Ġ", "<0x0A>")
_DISGUISES = ("\u200b", "\u200d", "\ufeff", "\u2060", "\u00ad", "\ufe0f", "\u0301", "\x00", "\u202e")
"""Signs without a width, a soft hyphen, an accent, right to left: some normalisers remove them."""
_WORDS = (*_LETTERS, *_SPACES, *_MARKS, *_TURNS, *_INTERNAL)
"""What templates, tokenizers and roles are written with, and what our own code uses inside."""


def halves_of_specials(tokenizer: Tokenizer, count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(end of one text, head of the next) that joined spell a special token, in disguises of every kind."""
    rng, tokens = random.Random(seed), sorted(tokenizer.special_tokens)
    pairs = []
    for _ in range(count if tokens else 0):
        token = rng.choice(tokens)
        cut = rng.randint(0, len(token))
        head, tail = token[:cut], token[cut:]
        disguise = rng.choice(_DISGUISES)
        words = [rng.choice(_WORDS) for _ in range(rng.randint(0, 2))]
        pairs.append(
            ("".join(words) + head + (disguise if rng.random() < 0.3 else ""), tail + "".join(words))
        )
    texts = [(head.replace("▁", ""), tail.replace("▁", "")) for head, tail in pairs]
    return texts if opens_with_space(tokenizer) else pairs


def full_width(text: str) -> str:
    """<|im_end|> as ＜｜ｉｍ＿ｅｎｄ｜＞, which NFKC turns into the token."""
    return "".join(chr(ord(char) + 0xFEE0) if "!" <= char <= "~" else char for char in text)


def random_texts(tokenizer: Tokenizer, count: int, seed: int = 0) -> list[str]:
    """`count` texts, a third of whose words are the text of the tokenizer's own special tokens."""
    texts = list(_random_texts(count, list(tokenizer.special_tokens), seed))
    return [text.replace("▁", "") for text in texts] if opens_with_space(tokenizer) else texts


def opens_with_space(tokenizer: Tokenizer) -> bool:
    """sentencepiece kinds: the first space belongs to them, and "▁" is how they write one."""
    return tokenizer.decode(tokenizer.encode("a▁")) == "a "


def _random_texts(count: int, traps: Sequence[str], seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    for _ in range(count):
        words = [
            rng.choice(traps if traps and rng.random() < 0.3 else _WORDS) for _ in range(rng.randint(0, 9))
        ]
        text = "".join(words)
        yield text if rng.random() < 0.7 else text[rng.randint(0, len(text)) :]


def random_examples(
    vocab_size: int, count: int = 6, *, seed: int = 0, prefix: int = 3, longest: int = 20
) -> list[Example]:
    """Conversations of different lengths with a common start, labels included; about half the positions have
    a label."""
    rng = np.random.default_rng(seed)

    def random_pairs(length: int) -> Ints:
        ids, labels = rng.integers(3, vocab_size, (2, length))
        return np.stack([ids, np.where(rng.random(length) < 0.5, labels, IGNORE_INDEX)])

    start = random_pairs(prefix)
    rows = []
    for row in range(count):
        ids, labels = np.concatenate([start, random_pairs(int(rng.integers(2, longest)))], axis=1)
        labels[-1] = 2
        rows.append(Example(ids, labels, f"rows:{row + 1}"))
    return rows
