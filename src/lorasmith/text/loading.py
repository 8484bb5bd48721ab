"""A model directory's tokenizer, read from tokenizer.json itself, or tokenizer.model where a family says so.

Not through transformers: its 5.x classes replace the pre-tokenizer of some files (DeepSeek's among them), and
text is then lost without a word. The `auto_map` of tokenizer_config.json, code to run, is not read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import tokenizers

from lorasmith.errors import DataError, FamilyError, TokenizerError
from lorasmith.text.render import ChatTemplate, take_spans
from lorasmith.tokenization.fast import FastTokenizer
from lorasmith.tokenization.sentencepiece_model import SentencePieceTokenizer, SpecialPieces
from lorasmith.tokenization.tokenizer import Tokenizer

JsonObject: TypeAlias = dict[str, Any]
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_CONTROLS = ("bos_token", "eos_token", "sep_token", "cls_token", "mask_token")
_OTHER_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt", "tekken.json")
_QUESTION = {"role": "user", "content": "a"}
_PROBES = (
    [{"role": "system", "content": "a"}, _QUESTION],
    [_QUESTION, {"role": "assistant", "content": "a"}, _QUESTION],
)


def load_tokenizer(directory: Path, special_pieces: SpecialPieces | None = None) -> Tokenizer:
    """The tokenizer of a model directory, with every control token shut off in plain text.

    With `special_pieces` it is the one in tokenizer.model, by sentencepiece.

    Raises: TokenizerError if there is none, or a file of it cannot be read, naming the file.
    """
    if special_pieces is not None:
        return _from_tokenizer_model(directory, special_pieces)
    config = {**_read_optional(directory / "special_tokens_map.json"), **_tokenizer_config(directory)}
    named = {name: _text_of(config[name]) for name in _NAMED if config.get(name)}
    template = _chat_template(directory, config)
    definition = _definition(directory)
    _add_missing(definition, config, named)
    controls = {named[name] for name in _CONTROLS if name in named} | _extra_specials(config)
    controls |= _written_by(template, named, definition["added_tokens"])
    _flag_special(definition, controls)
    backend = _backend(definition, directory / "tokenizer.json")
    return FastTokenizer(backend, named=named, chat_template=template)


def _from_tokenizer_model(directory: Path, special_pieces: SpecialPieces) -> Tokenizer:
    path = directory / "tokenizer.model"
    if not path.exists():
        raise TokenizerError(
            "the model directory has no tokenizer.model",
            where=str(directory),
            why="this family's tokenizer is made of that file",
            fix="download the whole model directory, tokenizer files included",
        )
    template = _chat_template(directory, _tokenizer_config(directory))
    try:
        return SentencePieceTokenizer(path.read_bytes(), special_pieces, chat_template=template)
    except (OSError, RuntimeError, ValueError) as error:  # sentencepiece raises RuntimeError for a bad file
        raise _unreadable(path, str(error)) from None


def _definition(directory: Path) -> JsonObject:
    path = directory / "tokenizer.json"
    definition = _read_json(path) if path.exists() else _converted(directory)
    if not isinstance(definition.get("model"), dict) or not isinstance(definition.get("added_tokens"), list):
        raise _unreadable(path, "it has no `model` and `added_tokens`")
    return definition


def _converted(directory: Path) -> JsonObject:
    """tokenizer.json as transformers makes it of older files; its remote code is never run."""
    if not any((directory / name).exists() for name in _OTHER_FILES):
        raise TokenizerError(
            "the model directory has no tokenizer",
            where=str(directory),
            why=f"there is neither tokenizer.json nor any of {', '.join(_OTHER_FILES)}",
            fix="download the whole model directory, tokenizer files included",
        )
    from transformers import AutoTokenizer  # late: it loads torch

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(directory), trust_remote_code=False, local_files_only=True
        )
        converted: JsonObject = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # transformers raises anything here; each means the same to the user
        raise TokenizerError(
            "the model directory has no tokenizer.json, and transformers cannot make one",
            where=str(directory),
            why=f"{type(error).__name__}: {error}",
            fix="get the model's tokenizer.json, or save one with `AutoTokenizer.save_pretrained`",
        ) from error
    return converted


def _backend(definition: JsonObject, path: Path) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(definition))
    except Exception as error:  # the only class that tokenizers raises
        raise _unreadable(path, str(error)) from None
    for token in definition["added_tokens"]:
        if backend.token_to_id(token["content"]) != token["id"]:
            raise _unreadable(path, f"the added token {token['content']!r} cannot have the id {token['id']}")
    return backend


def _add_missing(definition: JsonObject, config: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Added tokens that only tokenizer_config.json declares; control tokens that only the vocabulary has."""
    known = {token["content"] for token in definition["added_tokens"]}
    declared = {
        token["content"]: (int(i), token) for i, token in config.get("added_tokens_decoder", {}).items()
    }
    vocabulary = definition["model"].get("vocab")
    for name in _CONTROLS:
        token = named.get(name)
        if isinstance(vocabulary, dict) and token in vocabulary:
            declared.setdefault(token, (vocabulary[token], {"content": token, "special": True}))
    for content, (token_id, flags) in sorted(declared.items(), key=lambda item: item[1][0]):
        if content not in known:
            definition["added_tokens"].append(_added_token(token_id, flags))


def _added_token(token_id: int, flags: Mapping[str, Any]) -> JsonObject:
    wanted = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {"id": token_id, "content": flags["content"], **{name: bool(flags.get(name)) for name in wanted}}


def _flag_special(definition: JsonObject, controls: set[str]) -> None:
    for token in definition["added_tokens"]:
        token["special"] = token["special"] or token["content"] in controls


def _written_by(template: str | None, named: Mapping[str, str], added: list[JsonObject]) -> set[str]:
    """Added tokens by which the chat template marks turns: control tokens, whatever their flag says."""
    written = "\n".join(_probe(template, named)) if template else ""
    return {token["content"] for token in added if token["content"] in written and _is_mark(token["content"])}


def _is_mark(text: str) -> bool:
    """Not a word, a letter or white space ("▁" is sentencepiece's space), which users write too."""
    return any(not (char.isalnum() or char.isspace() or char == "▁") for char in text)


def _probe(source: str, named: Mapping[str, str]) -> Iterator[str]:
    template = ChatTemplate(source, named)
    for messages in _PROBES:
        try:
            yield take_spans(template.render(messages, add_generation_prompt=True))[0]
        except (DataError, FamilyError):  # the format that uses the template tells what is wrong with it
            continue


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.exists():
        return _read_text(path)
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {item["name"]: item["template"] for item in template}.get("default")
    return template if isinstance(template, str) else None


def _tokenizer_config(directory: Path) -> JsonObject:
    return _read_optional(directory / "tokenizer_config.json")


def _extra_specials(config: Mapping[str, Any]) -> set[str]:
    listed = [*(config.get("additional_special_tokens") or []), *_values(config.get("extra_special_tokens"))]
    return {_text_of(token) for token in listed}


def _values(extra: Any) -> list[Any]:
    return list(extra.values()) if isinstance(extra, dict) else list(extra or [])


def _text_of(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _read_optional(path: Path) -> JsonObject:
    return _read_json(path) if path.exists() else {}


def _read_json(path: Path) -> JsonObject:
    try:
        tree = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, str(error)) from None
    if not isinstance(tree, dict):
        raise _unreadable(path, f"it is a JSON {type(tree).__name__}, not an object")
    return tree


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, str(error)) from None


def _unreadable(path: Path, why: str) -> TokenizerError:
    return TokenizerError(
        f"cannot read {path.name}", where=str(path), why=why, fix="download this file again"
    )
