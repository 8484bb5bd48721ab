from __future__ import annotations

import pickle
import random
from pathlib import Path

import pytest
import sentencepiece
import sentencepiece_factory as pieces
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasmith.errors import TokenizerError
from lorasmith.testing.texts import random_texts
from lorasmith.text.loading import load_tokenizer
from lorasmith.tokenization.model_file import with_control_pieces
from lorasmith.tokenization.sentencepiece_model import SentencePieceTokenizer, SpecialPieces

RESERVED = SpecialPieces(reserved=r"<reserved_\d+>|<SEP>|<CLS>", appended=("<|late|>",))
TEXT = "  Hello,  你好 👩‍👩‍👧\n\ttab é\x00 "


def small(*, add_dummy_prefix: bool, special: SpecialPieces = RESERVED) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(pieces.trained(pieces.RESERVED, add_dummy_prefix), special)


@pytest.fixture(params=[False, True], ids=["plain", "dummy-prefix"])
def tokenizer(request: pytest.FixtureRequest) -> SentencePieceTokenizer:
    return small(add_dummy_prefix=request.param)


def test_every_text_comes_back(tokenizer: SentencePieceTokenizer) -> None:
    texts = [*random_texts(tokenizer, 3000), TEXT, "", " ", "\n"]
    for text, ids in zip(texts, tokenizer.encode_all(texts), strict=True):
        assert tokenizer.decode(ids) == text
        assert set(tokenizer.special_tokens.values()).isdisjoint(ids)


@settings(max_examples=500, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])), st.booleans())
def test_any_text_comes_back_but_for_the_sign_of_a_space(text: str, add_dummy_prefix: bool) -> None:
    tokenizer = small(add_dummy_prefix=add_dummy_prefix)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text.replace("▁", " ")
    assert not tokenizer.lost([text], [ids])


def test_stream_gives_whole_characters_that_join_to_the_text(tokenizer: SentencePieceTokenizer) -> None:
    for text in [TEXT, *random_texts(tokenizer, 500, seed=3)]:
        parts = list(tokenizer.stream(iter(tokenizer.encode(text))))
        assert "".join(parts) == text
        assert all("\ufffd" not in part for part in parts) or "\ufffd" in text
        assert all(parts)


def test_stream_is_decode_for_ids_that_no_text_gives(tokenizer: SentencePieceTokenizer) -> None:
    rng = random.Random(0)
    for _ in range(500):
        ids = [rng.randrange(-1, tokenizer.vocab_size + 5) for _ in range(rng.randrange(12))]
        assert "".join(tokenizer.stream(iter(ids))) == tokenizer.decode(ids)


def test_decode_is_sentencepieces_own(tokenizer: SentencePieceTokenizer) -> None:
    own = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.files["tokenizer.model"])
    for text in random_texts(tokenizer, 300):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == own.decode(ids)


def test_text_without_traps_has_sentencepieces_own_ids(tokenizer: SentencePieceTokenizer) -> None:
    own = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.files["tokenizer.model"])
    for text in ("Hello, you", TEXT, "<p>\n\tx</p>", "</s> <unk>"):
        assert tokenizer.encode(text) == own.encode(text)


def test_what_is_reserved_is_spelled_with_other_pieces(tokenizer: SentencePieceTokenizer) -> None:
    text = "a<reserved_106><reserved_107>b <SEP>"
    own = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.files["tokenizer.model"])
    ids = tokenizer.encode(text)
    assert tokenizer.special_id("<reserved_106>") == own.piece_to_id("<reserved_106>")
    assert tokenizer.special_id("<reserved_106>") in own.encode(text)
    assert tokenizer.special_id("<reserved_106>") not in ids
    assert tokenizer.decode(ids) == text


def test_special_tokens_and_their_ids(tokenizer: SentencePieceTokenizer) -> None:
    assert tokenizer.special_tokens["<unk>"] == tokenizer.pad_id == 0
    assert tokenizer.special_tokens["</s>"] == tokenizer.eos_id == 2
    assert tokenizer.special_id("<|late|>") == tokenizer.vocab_size - 1
    assert not {"<p>", "\n", "<0x0A>"} & set(tokenizer.special_tokens)
    with pytest.raises(TokenizerError, match="no special token '<missing>'"):
        tokenizer.special_id("<missing>")


def test_special_tokens_are_shown_if_asked(tokenizer: SentencePieceTokenizer) -> None:
    ids = [tokenizer.special_id("<|late|>"), *tokenizer.encode("Hello"), tokenizer.eos_id or 0]
    assert tokenizer.decode(ids) == "Hello"
    shown = tokenizer.decode(ids, skip_special=False)
    assert shown.startswith("<|late|>")
    assert shown.endswith("Hello</s>")


def test_a_vocabulary_without_bytes_loses_what_it_does_not_know() -> None:
    tokenizer = SentencePieceTokenizer(pieces.trained((), True, byte_fallback=False))
    texts = ["Hello", "龘"]
    assert tokenizer.lost(texts, tokenizer.encode_all(texts)) == [1]


def test_a_copy_is_the_same(tokenizer: SentencePieceTokenizer) -> None:
    copied = pickle.loads(pickle.dumps(tokenizer))
    assert copied.encode("a<reserved_106>") == tokenizer.encode("a<reserved_106>")
    assert copied.special_tokens == tokenizer.special_tokens


def test_the_original_file_is_kept_for_others(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(pieces.baichuan2_like(tmp_path), RESERVED)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert tokenizer.files == {"tokenizer.model": (tmp_path / "tokenizer.model").read_bytes()}


def test_only_pieces_that_match_whole_are_changed() -> None:
    model = pieces.trained(pieces.RESERVED, True)
    assert with_control_pieces(model, r"(?!)") == model
    assert with_control_pieces(model, r"reserved") == model
    changed = sentencepiece.SentencePieceProcessor(model_proto=with_control_pieces(model, r"<reserved_106>"))
    kinds = {piece: changed.is_control(changed.piece_to_id(piece)) for piece in pieces.RESERVED}
    assert [piece for piece, is_control in kinds.items() if is_control] == ["<reserved_106>"]


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x0a\xff", b"\x0a" + b"\xff" * 12, b"\x0b"])
@pytest.mark.parametrize("special", [RESERVED, SpecialPieces()], ids=["reserved", "none"])
def test_a_broken_file_is_named(tmp_path: Path, content: bytes, special: SpecialPieces) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"cannot read tokenizer\.model") as caught:
        load_tokenizer(tmp_path, special)
    assert str(tmp_path) in caught.value.where


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = pieces.baichuan2_like(tmp_path) / "tokenizer.model"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TokenizerError, match=r"cannot read tokenizer\.model"):
        load_tokenizer(tmp_path, RESERVED)


def test_a_directory_without_it(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.model"):
        load_tokenizer(tmp_path, RESERVED)
