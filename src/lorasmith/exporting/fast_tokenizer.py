"""An original tokenizer.model as the tokenizer.json that stock transformers loads.

sentencepiece joins the best-scored pair of neighbours, the leftmost of equals; `tokenizers` joins the pair of
the lowest rank. Ranking every way to make a piece by the piece's score gives the same ids on all texts tried;
`require_equal_ids` tells where it does not.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer

from lorasmith.errors import TokenizerError
from lorasmith.text.template import ChatFormat
from lorasmith.tokenization.model_file import user_defined_pieces
from lorasmith.tokenization.sentencepiece_model import SentencePieceTokenizer
from lorasmith.types import Conversation, Message

_SPACE = "▁"
_TALKS: tuple[tuple[Message, ...], ...] = (
    (Message("user", "你是谁？"),),
    (Message("system", "现在你要扮演皇帝身边的女人--甄嬛"), Message("user", "  Who are you?\n\n\t🌸 1723")),
    (
        Message("user", "Hello   world"),
        Message("assistant", "Hi, é and 龘.\n"),
        Message("user", "def f(x):\r\n    return x ** 2 "),
    ),
)


def tokenizer_files(tokenizer: SentencePieceTokenizer, chat_template: str | None) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and, if given, chat_template.jinja.

    In the text of a chat template the special tokens of `tokenizer` are read as such, as stock programs do.
    """
    backend = fast_backend(tokenizer)
    names = {token_id: token for token, token_id in tokenizer.special_tokens.items()}
    eos = names.get(-1 if tokenizer.eos_id is None else tokenizer.eos_id)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "eos_token": eos,
        "pad_token": names.get(tokenizer.pad_id),
        "padding_side": "left",
    }
    files = {"tokenizer.json": backend.to_str().encode(), "tokenizer_config.json": _json(config)}
    return files | ({"chat_template.jinja": chat_template.encode()} if chat_template else {})


def fast_backend(tokenizer: SentencePieceTokenizer) -> Tokenizer:
    """The same vocabulary, ids and rules in `tokenizers`; appended tokens behind the file's own."""
    model = tokenizer.files["tokenizer.model"]
    processor = SentencePieceProcessor(model_proto=model)
    pieces = [str(piece) for piece in processor.id_to_piece(list(range(processor.get_piece_size())))]
    whole = set(user_defined_pieces(model))
    whole |= {i for i in range(len(pieces)) if processor.is_control(i) or processor.is_unknown(i)}
    apart = whole | {i for i in range(len(pieces)) if processor.is_byte(i)}
    ranked = _merges(pieces, [processor.get_score(i) for i in range(len(pieces))], apart)
    vocab = {piece: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=ranked, byte_fallback=True))
    _write_spaces(backend, opens_with_space=processor.normalize("a") == f"{_SPACE}a")
    special = tokenizer.special_tokens
    words = [*(pieces[i] for i in sorted(whole)), *(t for t, i in special.items() if i >= len(pieces))]
    backend.add_tokens([AddedToken(word, normalized=False, special=word in special) for word in words])
    return backend


def _merges(pieces: Sequence[str], scores: Sequence[float], apart: set[int]) -> list[tuple[str, str]]:
    """Every way to make a piece of two, best pieces first. `apart` are ids that no pair makes or joins."""
    joinable = {piece for index, piece in enumerate(pieces) if index not in apart}
    order = sorted(set(range(len(pieces))) - apart, key=lambda i: (-scores[i], i))
    return [
        (pieces[i][:cut], pieces[i][cut:])
        for i in order
        for cut in range(1, len(pieces[i]))
        if pieces[i][:cut] in joinable and pieces[i][cut:] in joinable
    ]


def _write_spaces(backend: Tokenizer, *, opens_with_space: bool) -> None:
    opening = [normalizers.Prepend(_SPACE)] if opens_with_space else []
    closing = [decoders.Strip(content=" ", left=1)] if opens_with_space else []
    backend.normalizer = normalizers.Sequence([*opening, normalizers.Replace(" ", _SPACE)])
    spelled = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*spelled, *closing])


def require_equal_ids(directory: Path, chat_format: ChatFormat) -> None:
    """Load the tokenizer as stock transformers does and hold its prompts against `chat_format`.

    Raises: TokenizerError naming the conversation whose ids differ.
    """
    stock = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
    for talk in _TALKS:
        messages = [{"role": message.role, "content": message.content} for message in talk]
        text = stock.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        theirs = stock(text, add_special_tokens=False)["input_ids"]
        ours = chat_format.encode(Conversation(talk, "proof"), for_generation=True).input_ids.tolist()
        if theirs != ours:
            raise TokenizerError(
                "the converted tokenizer does not give the ids of the original one",
                where=repr(talk[-1].content),
                why=f"{theirs[:20]} instead of {ours[:20]}",
                fix="merge with --layout original, which keeps tokenizer.model",
            )


def _json(tree: dict[str, Any]) -> bytes:
    return (json.dumps(tree, indent=2, ensure_ascii=False) + "\n").encode()
