"""A model directory's tokenizer, read from tokenizer.json itself, or tokenizer.model where a family says so.

Not through transformers: its 5.x classes replace the pre-tokenizer of some files (DeepSeek's among them), and
text is then lost without a word. The `auto_map` of tokenizer_config.json, code to run, is not read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import tokenizers

from lorasmith.errors import DataError, FamilyError, TokenizerError
from lorasmith.json_file import DEEPEST, read_object, read_regular
from lorasmith.text.render import ChatTemplate, take_spans
from lorasmith.tokenization.fast import FastTokenizer
from lorasmith.tokenization.sentencepiece_model import SentencePieceTokenizer, SpecialPieces
from lorasmith.tokenization.tokenizer import Tokenizer

JsonObject: TypeAlias = dict[str, Any]
_LARGEST_FILE = 2**28
_LARGEST_TEMPLATE = 2**24
"""Bytes: tokenizer files of some tens of MB are known, and templates of some tens of KB."""
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
    config = {**_settings(directory / "special_tokens_map.json"), **_tokenizer_config(directory)}
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
        model = read_regular(path, _LARGEST_FILE)
        return SentencePieceTokenizer(model, special_pieces, chat_template=template)
    except (OSError, RuntimeError, ValueError) as error:  # sentencepiece raises RuntimeError for a bad file
        raise _unreadable(path, str(error)) from None


def _definition(directory: Path) -> JsonObject:
    path = directory / "tokenizer.json"
    # Half a million merges are not looked through for their depth: the backend has a limit of its own.
    definition = _read_json(path, deepest=None) if path.exists() else _converted(directory)
    added = definition.get("added_tokens")
    if not isinstance(definition.get("model"), dict) or not isinstance(added, list):
        raise _unreadable(path, "it has no `model` and `added_tokens`")
    for number, token in enumerate(added, start=1):
        if not isinstance(token, dict) or not _is_token(token) or type(token.get("id")) is not int:
            raise _unreadable(path, f"number {number} of added_tokens is no token")
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
        token["content"]: (int(i), token) for i, token in (config.get("added_tokens_decoder") or {}).items()
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
        token["special"] = token.get("special") or token["content"] in controls


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
        template = next((item["template"] for item in template if item["name"] == "default"), None)
    return template


def _tokenizer_config(directory: Path) -> JsonObject:
    return _settings(directory / "tokenizer_config.json")


def _settings(path: Path) -> JsonObject:
    """Raises: TokenizerError naming the key whose value is not what it must be."""
    tree = _read_json(path) if path.exists() else {}
    for key, value in tree.items():
        check = _is_token if key in _NAMED else _CHECKS.get(key)
        if check is not None and value is not None and value != "" and not check(value):
            raise _unreadable(path, f"{key} is {str(value)[:60]}")
    return tree


def _is_token(value: Any) -> bool:
    return isinstance(value.get("content") if isinstance(value, dict) else value, str)


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list | dict) and all(map(_is_token, _values(value)))


def _are_declared(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    numbered = all(key.isdecimal() and len(key) < 10 for key in value)
    return numbered and all(isinstance(token, dict) and _is_token(token) for token in value.values())


def _is_template(value: Any) -> bool:
    if not isinstance(value, list):
        return isinstance(value, str)
    return all(isinstance(item, dict) and _is_named_template(item) for item in value)


def _is_named_template(item: JsonObject) -> bool:
    return isinstance(item.get("name"), str) and isinstance(item.get("template"), str)


_CHECKS: Mapping[str, Callable[[Any], bool]] = {
    "added_tokens_decoder": _are_declared,
    "additional_special_tokens": _are_tokens,
    "extra_special_tokens": _are_tokens,
    "chat_template": _is_template,
}


def _extra_specials(config: Mapping[str, Any]) -> set[str]:
    keys = ("additional_special_tokens", "extra_special_tokens")
    listed = [token for key in keys for token in _values(config.get(key))]
    return {_text_of(token) for token in listed}


def _values(extra: Any) -> list[Any]:
    return list(extra.values()) if isinstance(extra, dict) else list(extra or [])


def _text_of(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _read_json(path: Path, *, deepest: int | None = DEEPEST) -> JsonObject:
    try:
        return read_object(path, most_bytes=_LARGEST_FILE, deepest=deepest)
    except (OSError, ValueError) as error:
        raise _unreadable(path, str(error)) from None


def _read_text(path: Path) -> str:
    try:
        return read_regular(path, _LARGEST_TEMPLATE).decode("utf-8")
    except (OSError, ValueError) as error:
        raise _unreadable(path, str(error)) from None


def _unreadable(path: Path, why: str) -> TokenizerError:
    return TokenizerError(
        f"cannot read {path.name}", where=str(path), why=why, fix="download this file again"
    )
