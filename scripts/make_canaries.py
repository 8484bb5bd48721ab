"""Write a family's canary: python scripts/make_canaries.py TOKENIZER_JSON OUT

TOKENIZER_JSON must be the model's own, proven file: its ids become what every load is checked against.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tokenizers

from lorasmith.text.fast import FastTokenizer

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


def main(tokenizer_json: Path, out: Path) -> None:
    definition = json.loads(tokenizer_json.read_text(encoding="utf-8"))
    tokenizer = FastTokenizer(tokenizers.Tokenizer.from_file(str(tokenizer_json)))
    encoded = tokenizer.encode_all(STRINGS)
    assert not tokenizer.lost(STRINGS, encoded)
    special = [token for token in definition["added_tokens"] if token["special"]]
    tree = {
        "vocab_size": tokenizer.vocab_size,
        "special_ids": {token["content"]: token["id"] for token in special[:10]},
        "parts": {name: definition[name] for name in PARTS},
    }
    head = json.dumps(tree, ensure_ascii=True, indent=1).removesuffix("\n}")
    rows = ",\n".join(f"  {json.dumps(row)}" for row in zip(STRINGS, encoded, strict=True))
    out.write_text(f'{head},\n "strings": [\n{rows}\n ]\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
