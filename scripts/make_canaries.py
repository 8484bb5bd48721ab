"""Write a family's canary: python scripts/make_canaries.py FAMILY DIRECTORY OUT

DIRECTORY must hold the model's own, proven tokenizer file: its ids become what every load is checked against.
"""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from pathlib import Path
from typing import Any

from lorasmith.families import find_family
from lorasmith.text.loading import load_tokenizer
from lorasmith.tokenization.fast import FastTokenizer

STRINGS = (
    "Hello, world!",
    " a leading space",
    "a trailing space ",
    "two  spaces,   three,    four",
    "\n",
    "\n\n",
    "line one\nline two\r\nline three\n\n\n",
    "\ttab\t\ttabs",
    "   \n  indented\n",
    "0123456789",
    "3.14159, 1,000,000 and 2026-11-21",
    "你好，世界！",
    "春眠不觉晓，处处闻啼鸟。",
    "中文 and English 混在一起。",
    "「引号」《书名》……——",
    "繁體字與异体字：龘靐齉",
    "ひらがな、カタカナ、漢字",
    "안녕하세요",
    "Привет, как дела?",
    "naïve café, Ångström, Straße, œuvre",
    "öüøÿ÷ÀÁþ",
    "e\u0301 is not é",
    "🙂👍🏽👨‍👩‍👧🇫🇷",
    "I'm, you're, they'll, WE'VE",
    "def f(x: int) -> str:\n    return f'{x!r}'\n",
    'for (i = 0; i < 10; i++) { print("%d\\n", i); }',
    "https://example.org/path?q=1&r=2#top",
    '{"key": [1, 2.5e-3, null]}',
    "User: hi\n\nAssistant: hello",
    "\u3000全角空格\u00a0no-break\u200bzero width",
    "∑∫√∞ ≠ ≤ ± → ⇒",
    "ALL CAPS camelCase snake_case kebab-case",
)
PARTS = ("normalizer", "pre_tokenizer", "decoder")
KNOWN_BY_PIECES = {"transnormer"}
"""Families whose ids and scores are proven, but not how their file normalizes text and runs of spaces."""


def main(family: str, directory: Path, out: Path) -> None:
    tokenizer = load_tokenizer(directory, find_family({}, family).special_pieces)
    strings = [text for text in STRINGS if family not in KNOWN_BY_PIECES or _is_normal(text)]
    encoded = tokenizer.encode_all(strings)
    assert not tokenizer.lost(strings, encoded)
    specials = sorted(tokenizer.special_tokens.items(), key=lambda item: item[1])
    tree: dict[str, Any] = {"vocab_size": tokenizer.vocab_size, "special_ids": dict(specials[:10])}
    if isinstance(tokenizer, FastTokenizer):
        definition = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
        tree["parts"] = {name: definition[name] for name in PARTS}
    head = json.dumps(tree, ensure_ascii=True, indent=1).removesuffix("\n}")
    rows = ",\n".join(f"  {json.dumps(row)}" for row in zip(strings, encoded, strict=True))
    out.write_text(f'{head},\n "strings": [\n{rows}\n ]\n}}\n', encoding="utf-8")


def _is_normal(text: str) -> bool:
    """No normalizer changes it; full-width punctuation is made of user-defined pieces, which none touches."""
    plain = re.sub("[，。！？、：《》]", "", text)
    odd_space = re.search(r"^\s|\s$|  |[\r\u200b-\u200d]", text)
    return unicodedata.normalize("NFKC", plain) == plain and not odd_space


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
