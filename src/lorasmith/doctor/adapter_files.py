"""An adapter's files: read as if they came from anywhere, and held against the base they are for.

The base is never loaded: what fits is told by its config.json and by the headers of its safetensors files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from lorasmith.adapters.check import adapter_fit, adapter_weights, require_fit
from lorasmith.adapters.lora import quiet_peft
from lorasmith.doctor.check import Check
from lorasmith.doctor.model_files import shards_of
from lorasmith.families.opening import open_family
from lorasmith.files.adapter_config import read_adapter_config, several
from lorasmith.files.adapter_dir import ADAPTER_WEIGHTS, GOLDEN_FILE
from lorasmith.files.tensor_header import TensorHeader, read_header
from lorasmith.model.load import empty_module
from lorasmith.model.plugin_classes import family_config
from lorasmith.runs.manifest import newest_checkpoint
from lorasmith.runs.run_dir import adapter_of

_PREFIX = "base_model.model."
_PAIRS = ((".lora_A.", ".lora_B."), (".lora_embedding_A", ".lora_embedding_B"))
"""What belongs together by name: (rank, in) and (out, rank). Source: peft's lora layers."""


def adapter_checks(directory: Path, base: Path | None, family: str = "auto") -> Iterator[Check]:
    """Of an adapter or a run: its settings, its shapes against `base`, its values.

    `base` None: the base is not on this machine. Raises: SetupError, CheckpointError, FamilyError.
    """
    adapter = adapter_of(directory, None)
    settings = read_adapter_config(adapter)
    weights = adapter_weights(adapter)
    if weights.name != ADAPTER_WEIGHTS:
        remedy = "load it once by `lorasmith chat`, which checks all of it; best, get it as safetensors"
        yield Check("adapter", "warn", f"{weights.name} is a pickle: nothing of it was read", remedy)
        return
    header = read_header(weights)
    yield _fit_check(adapter, base, family, header, settings)
    yield _values_check(directory, weights, settings)


def _fit_check(
    adapter: Path,
    base: Path | None,
    family: str,
    header: Mapping[str, TensorHeader],
    settings: Mapping[str, Any],
) -> Check:
    """Names, pairs, ranks and shapes. Raises: SetupError naming the tensors."""
    name, weights = "adapter fit", adapter / ADAPTER_WEIGHTS
    if base is None:
        problems = list(_unpaired(header, settings))
        if problems:
            remedy = "copy or download the adapter again; it is not whole"
            return Check(name, "fail", several(problems), remedy)
        told = f"{settings.get('base_model_name_or_path', 'its base')} is not on this machine"
        found = f"{told}: pairs and ranks fit each other, shapes are held against nothing"
        remedy = "download the base, or name its directory: lorasmith doctor BASE --adapter ADAPTER"
        return Check(name, "warn", found, remedy)
    module = empty_module(family_config(base, open_family(base, family)))
    with quiet_peft():
        require_fit(header, adapter_fit(module, adapter), weights)
    adapted = sorted({key.removeprefix(_PREFIX).partition(".lora_")[0] for key in header if ".lora_" in key})
    seen, problems = _held_against(module, adapted, _stored_shapes(base))
    if problems:
        remedy = "config.json and weights of the base do not belong together: download it again"
        return Check(name, "fail", several(problems), remedy)
    told = f"{len(header)} tensors on {len(adapted)} modules fit {base.name}'s config.json"
    return Check(name, "ok", f"{told}; {seen} of these modules were seen in its safetensors headers")


def _unpaired(header: Mapping[str, TensorHeader], settings: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with an adapter whatever its base is."""
    ranks = {settings["r"], *(settings.get("rank_pattern") or {}).values()}
    for first, second in _PAIRS:
        for name in sorted(header):
            twin = name.replace(first, second) if first in name else name.replace(second, first)
            if twin == name:
                continue
            if twin not in header:
                yield f"{name} has no {twin.rpartition('.lora_')[2]}"
            elif first in name:
                yield from _rank_faults(name, header[name].shape, header[twin].shape, ranks)


def _rank_faults(
    name: str, a_shape: tuple[int, ...], b_shape: tuple[int, ...], ranks: set[int]
) -> Iterator[str]:
    if len(a_shape) < 2 or len(b_shape) < 2 or a_shape[0] != b_shape[1]:
        yield f"{name} {a_shape} does not multiply with its B {b_shape}"
    elif a_shape[0] not in ranks:
        yield f"{name} has rank {a_shape[0]}, its settings name {', '.join(map(str, sorted(ranks)))}"


def _stored_shapes(base: Path) -> dict[str, tuple[int, ...]]:
    """By the names of the base's files; none for a base of .bin files, which have no headers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in shards_of(base):
        if shard.endswith(".safetensors") and (base / shard).is_file():
            shapes |= {name: tensor.shape for name, tensor in read_header(base / shard).items()}
    return shapes


def _held_against(
    module: nn.Module, adapted: list[str], stored: Mapping[str, tuple[int, ...]]
) -> tuple[int, list[str]]:
    """How many adapted modules the base's files show under their own names, and which of them differ."""
    own = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    names = [f"{path}.weight" for path in adapted if f"{path}.weight" in stored and f"{path}.weight" in own]
    problems = [
        f"{name} is {stored[name]} in the base's files, {own[name]} by its config.json"
        for name in names
        if stored[name] != own[name]
    ]
    return len(names), problems


def _values_check(directory: Path, weights: Path, settings: Mapping[str, Any]) -> Check:
    """Finite, trained, and with checkpoints that verify."""
    tensors = load_file(weights)
    wild = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if wild:
        return Check("adapter", "fail", f"{len(wild)} tensors are not finite", "take an earlier checkpoint")
    told = f"LoRA, r {settings['r']}, {len(tensors)} tensors"
    seconds = [tensor for name, tensor in tensors.items() if "lora_B" in name]
    if seconds and not any(torch.count_nonzero(tensor) for tensor in seconds):
        remedy = "train it: it answers as its base does"
        return Check("adapter", "warn", f"{told}; every B is zero", remedy)
    skipped = newest_checkpoint(directory)[1]
    if skipped:
        names = ", ".join(path.name for path in skipped)
        remedy = "a resume passes over damaged checkpoints"
        return Check("adapter", "warn", f"{told}; damaged: {names}", remedy)
    golden = f", {GOLDEN_FILE} for `lorasmith verify`" if (directory / GOLDEN_FILE).exists() else ""
    return Check("adapter", "ok", told + golden)
