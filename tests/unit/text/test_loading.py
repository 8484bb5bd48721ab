from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers_factory as factory

from lorasmith.errors import TokenizerError
from lorasmith.text.loading import load_tokenizer


def test_names_as_text_or_as_added_token(tmp_path: Path) -> None:
    eos = {"content": "<|eot_id|>", "__type": "AddedToken", "lstrip": False}
    factory.write(tmp_path, factory.byte_level(factory.LLAMA3_SPECIAL), eos_token=eos)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_id == tokenizer.special_id("<|eot_id|>")


def test_without_tokenizer_config(tmp_path: Path) -> None:
    (factory.llama3_like(tmp_path) / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_id is None
    assert tokenizer.chat_template is None
    assert set(tokenizer.special_tokens) == set(factory.LLAMA3_SPECIAL)


def test_chat_template_file_goes_before_the_config(tmp_path: Path) -> None:
    factory.chatml(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert load_tokenizer(tmp_path).chat_template == "{{ messages }}"


def test_named_templates_give_the_default_one(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": factory.CHATML}]
    factory.write(tmp_path, factory.byte_level(factory.CHATML_SPECIAL), chat_template=named)
    assert load_tokenizer(tmp_path).chat_template == factory.CHATML


def test_added_tokens_that_only_the_config_declares(tmp_path: Path) -> None:
    backend = factory.byte_level(["<eos>"])
    token_id = backend.get_vocab_size()
    declared = {str(token_id): {"content": "<|late|>", "special": True}}
    factory.write(tmp_path, backend, added_tokens_decoder=declared, eos_token="<eos>")
    assert load_tokenizer(tmp_path).special_tokens["<|late|>"] == token_id


def test_an_added_token_with_an_impossible_id_is_refused(tmp_path: Path) -> None:
    declared = {"9999": {"content": "<|late|>", "special": True}}
    factory.write(tmp_path, factory.byte_level(["<eos>"]), added_tokens_decoder=declared)
    with pytest.raises(TokenizerError, match=r"cannot read tokenizer\.json") as caught:
        load_tokenizer(tmp_path)
    assert "<|late|>" in caught.value.why


def test_an_eos_that_is_only_a_word_of_the_vocabulary_is_shut_off(tmp_path: Path) -> None:
    backend = factory.metaspace([], "legacy")
    definition = json.loads(backend.to_str())
    definition["model"]["vocab"]["</s>"] = len(definition["model"]["vocab"])
    factory.write(tmp_path, backend, eos_token="</s>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.special_tokens == {"</s>": tokenizer.eos_id}
    assert tokenizer.eos_id not in tokenizer.encode("</s>")


def test_white_space_and_words_in_a_template_are_no_control_tokens(tmp_path: Path) -> None:
    backend = factory.byte_level(factory.CHATML_SPECIAL, ["\n", "user", "  "])
    factory.write(tmp_path, backend, factory.CHATML, eos_token="<|endoftext|>")
    assert set(load_tokenizer(tmp_path).special_tokens) == set(factory.CHATML_SPECIAL)


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="has no tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert caught.value.fix


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("damage", [b'{"version": "1.0", ', b"\xff\xfe", b"[]", b""])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: bytes) -> None:
    factory.llama3_like(tmp_path)
    (tmp_path / name).write_bytes(damage)
    with pytest.raises(TokenizerError, match=f"cannot read {name}"):
        load_tokenizer(tmp_path)


def test_a_definition_that_tokenizers_does_not_know(tmp_path: Path) -> None:
    factory.llama3_like(tmp_path)
    definition = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    definition["model"]["type"] = "Abacus"
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
    with pytest.raises(TokenizerError, match=r"cannot read tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_older_files_go_through_transformers(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "you"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert load_tokenizer(tmp_path).encode("hello you") == [5, 6]


def test_older_files_that_transformers_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"not a sentencepiece model")
    with pytest.raises(TokenizerError, match="transformers cannot make one"):
        load_tokenizer(tmp_path)


def test_chat_and_families_load_no_torch() -> None:
    code = (
        "import sys, lorasmith.families, lorasmith.text.loading, lorasmith.text.jinja\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
