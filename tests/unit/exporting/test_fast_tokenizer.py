"""tokenizer.model as tokenizer.json: the same ids, with the real vocabularies where they are at hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from chat_texts import real_format
from modules import tiny_module
from transformers import AutoTokenizer

from lorasmith.exporting.fast_tokenizer import fast_backend, require_equal_ids, tokenizer_files
from lorasmith.exporting.layout import native_layout
from lorasmith.testing.texts import random_texts
from lorasmith.tokenization.sentencepiece_model import SentencePieceTokenizer
from lorasmith.types import Conversation, Message

TEMPLATES = {
    kind: native_layout(tiny_module(kind).config).chat_template for kind in ("baichuan2", "chatglm3")
}


def real(shared: Path, tmp_path: Path, family: str) -> SentencePieceTokenizer:
    tokenizer = real_format(shared, tmp_path, family, "official").tokenizer
    assert isinstance(tokenizer, SentencePieceTokenizer)
    return tokenizer


def strings(tree: object) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from (key, *strings(value))
    elif isinstance(tree, list):
        for value in tree:
            yield from strings(value)


@pytest.mark.slow
@pytest.mark.parametrize("family", TEMPLATES)
def test_every_text_has_its_ids(shared: Path, tmp_path: Path, family: str) -> None:
    tokenizer = real(shared, tmp_path, family)
    rows = json.loads((shared / "data/datasets/huanhuan.json").read_text(encoding="utf-8"))
    alpaca = (shared / "data/datasets/alpaca_subset.hiyouga_LLaMA-Factory.json").read_text(encoding="utf-8")
    golden = (shared / f"golden/tokenization/{family}_official.json").read_text(encoding="utf-8")
    texts = [*strings(rows), *strings(json.loads(alpaca)), *strings(json.loads(golden))]
    texts += random_texts(tokenizer, 3000)
    backend = fast_backend(tokenizer)
    backend.encode_special_tokens = True  # as our own tokenizer reads text; prompts are tested below
    theirs = [encoding.ids for encoding in backend.encode_batch(texts, add_special_tokens=False)]
    ours = tokenizer.encode_all(texts)
    assert [text for text, a, b in zip(texts, ours, theirs, strict=True) if a != b] == []
    assert len(texts) > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("family", TEMPLATES)
def test_what_is_decoded_is_what_was_said(shared: Path, tmp_path: Path, family: str) -> None:
    tokenizer = real(shared, tmp_path, family)
    backend = fast_backend(tokenizer)
    for text in ("臣妾做不到啊 🌸", "def f(x):\n\treturn  x", "龘 é"):
        assert backend.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("family", TEMPLATES)
def test_stock_prompts_are_ours(shared: Path, tmp_path: Path, family: str) -> None:
    chat_format = real_format(shared, tmp_path, family, "official")
    directory = tmp_path / "native"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama"}')
    for name, data in tokenizer_files(real(shared, directory, family), TEMPLATES[family]).items():
        (directory / name).write_bytes(data)
    (directory / "tokenizer.model").unlink()
    require_equal_ids(directory, chat_format)
    stock, checked = AutoTokenizer.from_pretrained(directory), 0
    golden = json.loads((shared / f"golden/tokenization/{family}_official.json").read_text(encoding="utf-8"))
    special = chat_format.tokenizer.special_tokens
    for case in golden["conversations"]:
        talk = tuple(Message(m["role"], m["content"]) for m in case["messages"][:-1])
        if any(token in message.content for message in talk for token in special):
            continue  # stock programs read a control token in a user's text as one: that is theirs
        checked += 1
        ours = chat_format.encode(Conversation(talk, "row"), for_generation=True).input_ids.tolist()
        messages = [{"role": message.role, "content": message.content} for message in talk]
        assert stock.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == ours
    assert checked >= 5
