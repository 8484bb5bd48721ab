"""A model directory's files: all there, of the right size, readable; and what in them is ignored."""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lorasmith.doctor.check import Check
from lorasmith.errors import SetupError
from lorasmith.families.opening import open_family
from lorasmith.files.model_dir import read_json, read_json_if_there
from lorasmith.files.tensor_header import read_header
from lorasmith.model.load import CODE_KEYS
from lorasmith.model.plugin_classes import family_config

_AGAIN = "`lorasmith download` fetches what is missing; a directory of your own: copy it again"
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_LONGEST_NAME = 255  # bytes, on Linux; elsewhere it is no more
_SHA256 = re.compile(r"[0-9a-f]{64}")


def family_check(directory: Path, family: str) -> Check:
    """Which family config.json fits, and that its class is known. Raises: SetupError, FamilyError."""
    found = open_family(directory, family)
    config = family_config(directory, found)
    return Check("family", "ok", f"{found.name} ({found.title}), {config.model_type}")


def code_check(directory: Path) -> Check:
    """Code that other programs would run from here; it is never run by us."""
    tree = read_json(directory / "config.json")
    tokenizer = read_json_if_there(directory / "tokenizer_config.json")
    keys = sorted({key for key in CODE_KEYS if key in tree} | {key for key in CODE_KEYS if key in tokenizer})
    scripts = sorted(path.name for path in directory.glob("*.py"))
    if not keys and not scripts:
        return Check("remote code", "ok", "none")
    return Check("remote code", "ok", f"ignored, never run: {', '.join([*keys, *scripts])}")


def weights_check(directory: Path) -> Check:
    """Every shard that the index names, whole and with the tensors it is to have.

    Raises: SetupError for an index that cannot be read.
    """
    shards = shards_of(directory)
    if not shards:
        return Check("weights", "fail", f"neither {' nor '.join((*_SINGLE, *_INDEXES))} is here", _AGAIN)
    problems = [problem for name, tensors in shards.items() for problem in _faults(directory / name, tensors)]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        return Check("weights", "fail", "; ".join(problems[:3]) + more, _AGAIN)
    total = sum((directory / name).stat().st_size for name in shards)
    return Check("weights", "ok", f"{len(shards)} files, {total / 1e9:.2f} GB, none cut short")


def hash_checks(directory: Path) -> Iterator[Check]:
    """sha256 of each shard, held against the name that a hub cache gives to the file."""
    for name in shards_of(directory):
        path = directory / name
        found = _sha256(path)
        stored = path.resolve().name
        if not _SHA256.fullmatch(stored):
            yield Check(f"sha256 {name}", "ok", f"{found} (nothing here to hold it against)")
        elif stored == found:
            yield Check(f"sha256 {name}", "ok", f"{found[:16]}..., as the hub has it")
        else:
            told = f"{found[:16]}..., the hub has {stored[:16]}..."
            yield Check(f"sha256 {name}", "fail", told, f"delete {path.resolve()}, then {_AGAIN}")


def shards_of(directory: Path) -> dict[str, set[str]]:
    """File name -> the tensors that the index puts into it; without an index, one file and no names."""
    for index in _INDEXES:
        if (directory / index).exists():
            return _indexed(read_json(directory / index), directory / index)
    return {name: set() for name in _SINGLE if (directory / name).exists()} if _any_single(directory) else {}


def _any_single(directory: Path) -> bool:
    return any((directory / name).exists() for name in _SINGLE)


def _indexed(tree: Mapping[str, Any], path: Path) -> dict[str, set[str]]:
    shards: dict[str, set[str]] = {}
    weight_map = tree.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SetupError(f"{path.name} names no weights", where=str(path), fix=_AGAIN)
    for tensor, shard in weight_map.items():
        if Path(str(shard)).name != shard or len(shard.encode(errors="replace")) > _LONGEST_NAME:
            why = repr(shard)[:100]
            raise SetupError(f"{path.name} names what is no file of its directory", where=str(path), why=why)
        shards.setdefault(shard, set()).add(tensor)
    return shards


def _faults(path: Path, tensors: set[str]) -> Iterator[str]:
    if not path.is_file():
        yield f"{path.name} is missing"
    elif path.suffix != ".safetensors":
        if not zipfile.is_zipfile(path):
            yield f"{path.name} is no torch file, or cut short"
    else:
        yield from _safetensors_faults(path, tensors)


def _safetensors_faults(path: Path, tensors: set[str]) -> Iterator[str]:
    try:
        header = read_header(path)
    except SetupError as error:
        yield f"{path.name}: {error.why or error.what}"
        return
    missing = tensors - header.keys()
    if missing:
        yield f"{path.name} lacks {len(missing)} tensors of the index, e.g. {min(missing)}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
