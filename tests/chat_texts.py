"""Random texts full of traps, and the formats that every law of chat is checked on."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import tokenizers_factory as factory

from lorasmith.families import all_families
from lorasmith.text.loading import load_tokenizer
from lorasmith.text.template import ChatFormat
from lorasmith.text.tokenizer import Tokenizer

_WORDS = (
    *(
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
        "\n",
        "\n\n",
        "\r\n",
        "\t",
    ),
    *(
        " ",
        "  ",
        "   ",
        "1723",
        "3.14",
        "User:",
        "\n\nAssistant:",
        "</think>",
        "[INST]",
        "{{",
        "%}",
        "<|",
        "|>",
        "<",
    ),
    *(
        "\ufdd0",
        "\ufdd1",
        "\ufffd",
        "\u200b",
        "qz0q",
        "qzz1q",
        "▁",
        "Ġ",
        "<0x0A>",
        "'",
        '"',
        "\\n",
        "\x00",
        "龘",
        "ß",
    ),
)

LIKE: dict[str, Callable[[Path], Path]] = {
    "llama3": factory.llama3_like,
    "deepseek": factory.deepseek_like,
}
GENERIC: dict[str, Callable[[Path], Path]] = {
    "chatml": factory.chatml,
    "chatml-generation": lambda path: factory.chatml(path, factory.CHATML_GENERATION),
    "gemma": factory.gemma_like,
    "llama2-legacy": factory.llama2_like,
    "llama2-first": lambda path: factory.llama2_like(path, "first"),
    "llama2-always": lambda path: factory.llama2_like(path, "always"),
    "marked": factory.marked,
}
FORMATS = [
    *((family, name) for family in LIKE for name in ("official", "tutorial")),
    *((template, "official") for template in GENERIC),
]


def make_format(directory: Path, family: str, name: str) -> ChatFormat:
    write = LIKE.get(family) or GENERIC[family]
    tokenizer = load_tokenizer(write(directory))
    families = {known.name: known for known in all_families()}
    return families.get(family, families["generic"]).chat_format(name, tokenizer)


def opens_with_space(tokenizer: Tokenizer) -> bool:
    """sentencepiece kinds: the first space belongs to them, and "▁" is how they write one."""
    return tokenizer.decode(tokenizer.encode("a▁")) == "a "


def texts_for(tokenizer: Tokenizer, count: int, seed: int = 0) -> list[str]:
    texts = list(_random_texts(count, list(tokenizer.special_tokens), seed))
    return [text.replace("▁", "") for text in texts] if opens_with_space(tokenizer) else texts


def _random_texts(count: int, traps: Sequence[str], seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    for _ in range(count):
        words = [
            rng.choice(traps if traps and rng.random() < 0.3 else _WORDS) for _ in range(rng.randint(0, 9))
        ]
        text = "".join(words)
        yield text if rng.random() < 0.7 else text[rng.randint(0, len(text)) :]
