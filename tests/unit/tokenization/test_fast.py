from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import tokenizers_factory as factory
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lorasmith.errors import TokenizerError
from lorasmith.text.loading import load_tokenizer
from lorasmith.tokenization.fast import FastTokenizer

TEXT = "你好 naïve ü 👩‍👩‍👧 \n  two  spaces"


@pytest.fixture
def deepseek(tmp_path: Path) -> FastTokenizer:
    tokenizer = load_tokenizer(factory.deepseek_like(tmp_path))
    assert isinstance(tokenizer, FastTokenizer)
    return tokenizer


def test_stream_yields_whole_characters_that_join_to_decode(deepseek: FastTokenizer) -> None:
    ids = deepseek.encode(TEXT)
    parts = list(deepseek.stream(iter(ids)))
    assert "".join(parts) == TEXT
    assert len(parts) > 10
    assert not any("\ufffd" in part for part in parts)


def test_stream_shows_a_half_character_at_the_very_end_only(deepseek: FastTokenizer) -> None:
    ids = deepseek.encode("a👩")[:-1]
    parts = list(deepseek.stream(iter(ids)))
    assert "".join(parts) == deepseek.decode(ids)
    assert parts[0] == "a"
    assert "\ufffd" in parts[-1]


def test_stream_skips_special_tokens(deepseek: FastTokenizer) -> None:
    ids = [*deepseek.encode("a b"), deepseek.eos_id or 0]
    assert "".join(deepseek.stream(iter(ids))) == "a b"


@pytest.mark.parametrize("scheme", ["legacy", "first", "always"])
def test_stream_of_a_sentencepiece_kind(tmp_path: Path, scheme: str) -> None:
    tokenizer = load_tokenizer(factory.llama2_like(tmp_path, scheme))
    ids = tokenizer.encode("Hello, you 你好 👩")
    assert "".join(tokenizer.stream(iter(ids))) == "Hello, you 你好 👩" == tokenizer.decode(ids)


def test_added_letters_match_raw_text_and_come_back(deepseek: FastTokenizer) -> None:
    ids = deepseek.encode("xøy")
    assert len(ids) == 3
    assert deepseek.decode(ids) == "xøy"


def test_pad_is_the_configured_token_else_eos_else_zero(tmp_path: Path) -> None:
    backend = factory.byte_level(["<eos>", "<pad>"])
    eos, pad = backend.token_to_id("<eos>"), backend.token_to_id("<pad>")
    assert FastTokenizer(backend, named={"eos_token": "<eos>", "pad_token": "<pad>"}).pad_id == pad
    assert FastTokenizer(backend, named={"eos_token": "<eos>"}).pad_id == eos
    assert FastTokenizer(backend).pad_id == 0


def test_an_eos_that_the_vocabulary_lacks_is_refused() -> None:
    with pytest.raises(TokenizerError, match="no eos_token '<missing>'"):
        FastTokenizer(factory.byte_level([]), named={"eos_token": "<missing>"})


def test_unknown_words_count_as_lost() -> None:
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "known": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = FastTokenizer(backend)
    texts = ["known", "stranger"]
    assert tokenizer.lost(texts, tokenizer.encode_all(texts)) == [1]


def test_text_that_the_pre_tokenizer_drops_is_lost() -> None:
    backend = factory.byte_level([])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.ByteLevel()
    tokenizer = FastTokenizer(backend)
    assert tokenizer.lost(["你好"], tokenizer.encode_all(["你好"])) == [0]


def test_a_control_token_that_the_model_itself_knows_stays_text() -> None:
    """Unigram matches every word of its vocabulary, control tokens too."""
    words = [("<unk>", -9.0), ("</s>", 0.0), *((char, -1.0) for char in "ab</s>")]
    backend = Tokenizer(models.Unigram(words, unk_id=0))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["</s>"])
    tokenizer = FastTokenizer(backend, named={"eos_token": "</s>"})
    ids = tokenizer.encode("a</s></s>b")
    assert 1 not in ids
    assert tokenizer.decode(ids) == "a</s></s>b"


def test_rebuilt_keeps_the_vocabulary_and_takes_other_parts(deepseek: FastTokenizer) -> None:
    damaged = deepseek.rebuilt({"pre_tokenizer": {"type": "Whitespace"}})
    assert damaged.vocab_size == deepseek.vocab_size
    assert damaged.special_tokens == deepseek.special_tokens
    assert damaged.encode("a b") != deepseek.encode("a b")


def test_a_copy_keeps_control_tokens_off(deepseek: FastTokenizer) -> None:
    copied = pickle.loads(pickle.dumps(deepseek))
    eos = "<｜end▁of▁sentence｜>"
    assert copied.encode(eos) == deepseek.encode(eos) != [deepseek.eos_id]
    assert copied.eos_id == deepseek.eos_id


def test_control_pattern_takes_the_white_space_that_a_token_swallows(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(factory.marked(tmp_path))
    assert isinstance(tokenizer, FastTokenizer)
    match = tokenizer.control_pattern.search("x<|user|>\n  y")
    assert match
    assert match[0] == "<|user|>\n  "
    assert match[match.lastindex or 0] == "<|user|>"


def test_ids_equal_stock_transformers(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    directory = factory.llama3_like(tmp_path)
    stock, ours = PreTrainedTokenizerFast.from_pretrained(str(directory)), load_tokenizer(directory)
    for text in (*factory.CORPUS, TEXT):
        assert ours.encode(text) == stock.encode(text, add_special_tokens=False)
