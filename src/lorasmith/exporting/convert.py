"""An adapter over a fused projection <-> an adapter over q, k and v: files in, files out, no base weights.

The change of a fused projection is s B A, B with the rows of q, k and v below each other.
Fused to split: s B_q A, s B_k A, s B_v A, each of the same rank. Split to fused: A = [A_q; A_k; A_v] and B
block diagonal, of three times the rank; where q, k and v share one A, of the same rank. Both are exact.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import save
from torch import Tensor
from transformers import PretrainedConfig

from lorasmith.adapters.lora import read_adapter
from lorasmith.errors import ConfigError
from lorasmith.exporting.layout import PROJECTIONS, NativeLayout, layout_around, projection_rows
from lorasmith.exporting.native import unit_rows
from lorasmith.exporting.staging import keep_golden, staged
from lorasmith.files.adapter_config import read_adapter_config
from lorasmith.files.adapter_dir import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from lorasmith.model.load import empty_module
from lorasmith.storage import Storage

_PREFIX = "base_model.model."
_PLAIN_ONLY = {
    "use_dora": "DoRA has a length for each row of the merged weight, which a changed shape does not keep",
    "lora_bias": "the bias of a fused projection is not cut here",
    "trainable_token_indices": "trained tokens are not renamed here",
    "target_parameters": "adapters on bare parameters are not renamed here",
}


@dataclass(frozen=True)
class Factors:
    """One module's share of an adapter: the change of its weight is scale B A."""

    a_RD: Tensor
    b_OR: Tensor
    scale: float


def convert(
    adapter: Path,
    config: PretrainedConfig,
    output_dir: Path,
    *,
    to: str,
    new_base: str | None,
    storage: Storage,
) -> None:
    """`config` is of the model that the adapter was trained on; `new_base` names the one it is for now.

    Raises: ConfigError if there is nothing to convert, or the adapter is more than plain LoRA; SetupError for
    settings that are refused, tensors that are not this model's, and content in `output_dir`.
    """
    tree = read_adapter_config(adapter)
    _require_plain(tree, adapter)
    layout, rows = layout_around(config, to=to), projection_rows(config)
    modules, whole = _read(read_adapter(empty_module(config), adapter), tree)
    if to == "split":
        modules, whole = _split(modules, layout, rows), _native_whole(whole, layout)
    else:
        modules, whole = _fused(modules, layout, rows), _original_whole(whole, modules, layout)
    text = json.dumps(_described(tree, modules, whole, new_base), indent=2, ensure_ascii=False) + "\n"
    weights = save(_written(modules, whole), metadata={"format": "pt"})
    with staged(storage, output_dir, needed=len(weights)) as folder:
        storage.create(folder / ADAPTER_CONFIG, text.encode())
        storage.create(folder / ADAPTER_WEIGHTS, weights)
        keep_golden(storage, adapter, folder)


def _require_plain(tree: Mapping[str, Any], adapter: Path) -> None:
    if tree.get("bias", "none") != "none":
        what = f"only plain LoRA is converted, not one with bias {tree['bias']!r}"
        raise ConfigError(what, where=str(adapter / ADAPTER_CONFIG))
    for key, why in _PLAIN_ONLY.items():
        if tree.get(key):
            fix = "merge the adapter with --layout native instead"
            raise ConfigError(f"an adapter with {key} is not converted", where=str(adapter), why=why, fix=fix)


def _read(
    tensors: Mapping[str, Tensor], tree: Mapping[str, Any]
) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """Factors by module path, and the tensors of modules that were trained whole."""
    modules, whole = {}, {}
    for name, tensor in sorted(tensors.items()):
        path, found, _ = name.removeprefix(_PREFIX).partition(".lora_A.weight")
        if found:
            b_OR = tensors[name.replace(".lora_A.", ".lora_B.")]
            modules[path] = Factors(tensor, b_OR, _scale(path, len(tensor), tree))
        elif "lora_" not in name:
            whole[name.removeprefix(_PREFIX)] = tensor
        elif not name.endswith(".lora_B.weight"):
            raise ConfigError(f"the adapter tensor {name} is not of a linear layer and cannot be converted")
    return modules, whole


def _scale(path: str, r: int, tree: Mapping[str, Any]) -> float:
    alphas = tree.get("alpha_pattern") or {}
    alpha = alphas.get(get_pattern_key(alphas, path), tree["lora_alpha"])
    return float(alpha / math.sqrt(r) if tree.get("use_rslora") else alpha / r)


def _split(
    modules: Mapping[str, Factors], layout: NativeLayout, rows: tuple[int, int, int]
) -> dict[str, Factors]:
    split: dict[str, Factors] = {}
    for path, whole in modules.items():
        names = layout.split_names(path)
        if not names:
            split[_renamable(path, layout)] = whole
            continue
        for name, b_OR in zip(names, whole.b_OR.split(rows), strict=True):
            split[name] = Factors(whole.a_RD.clone(), b_OR.clone(), whole.scale)
    return split


def _renamable(path: str, layout: NativeLayout) -> str:
    if layout.normed_head and path == "lm_head":
        raise ConfigError(
            "LoRA on Baichuan2's head cannot be converted",
            why="NormHead divides its rows by their length, so a sum of weights is no sum of heads",
        )
    return layout.native_name(path)


def _fused(
    modules: Mapping[str, Factors], layout: NativeLayout, rows: tuple[int, int, int]
) -> dict[str, Factors]:
    fused: dict[str, Factors] = {}
    groups: dict[str, dict[str, Factors]] = {}
    for path, part in modules.items():
        name = path.rpartition(".")[2]
        if name in PROJECTIONS:
            groups.setdefault(_fused_path(path, layout), {})[name] = part
        else:
            _renamable(path, layout)
            fused[layout.original_name(path)] = part
    for path, parts in groups.items():
        fused[path] = _joined(path, parts, dict(zip(PROJECTIONS, rows, strict=True)))
    return fused


def _fused_path(path: str, layout: NativeLayout) -> str:
    layer = path.rpartition(".self_attn.")[0]
    return f"{layout.original_name(layer)}.{layout.fused}"


def _joined(path: str, parts: Mapping[str, Factors], rows: Mapping[str, int]) -> Factors:
    """A projection without an adapter keeps rows of zeros. The scale is that of the first part."""
    first = next(iter(parts.values()))
    scaled = {
        name: part.b_OR if part.scale == first.scale else part.b_OR * (part.scale / first.scale)
        for name, part in parts.items()
    }
    if all(torch.equal(part.a_RD, first.a_RD) for part in parts.values()):
        rank = first.b_OR.shape[1]
        blocks = [scaled.get(name, first.b_OR.new_zeros(count, rank)) for name, count in rows.items()]
        return Factors(first.a_RD, torch.cat(blocks), first.scale)
    blocks = [scaled.get(name, first.b_OR.new_zeros(count, 0)) for name, count in rows.items()]
    a_RD = torch.cat([parts[name].a_RD for name in rows if name in parts])
    return Factors(a_RD, torch.block_diag(*blocks), first.scale)


def _native_whole(whole: Mapping[str, Tensor], layout: NativeLayout) -> dict[str, Tensor]:
    """Modules that were trained in full, by their new names; a NormHead as the plain head that equals it."""
    native = {}
    for name, tensor in whole.items():
        path, _, kind = name.rpartition(".")
        is_head = layout.normed_head and path == "lm_head"
        native[f"{layout.native_name(path)}.{kind}"] = unit_rows(tensor) if is_head else tensor
    return native


def _original_whole(
    whole: Mapping[str, Tensor], modules: Mapping[str, Factors], layout: NativeLayout
) -> dict[str, Tensor]:
    if layout.normed_head and "lm_head.weight" in whole:
        raise ConfigError(
            "a plain head trained in full cannot be made Baichuan2's",
            why="NormHead would divide its rows by their length",
        )
    parts = ((*name.rpartition("."), tensor) for name, tensor in whole.items())
    return {f"{layout.original_name(path)}.{kind}": tensor for path, _, kind, tensor in parts}


def _described(
    tree: Mapping[str, Any], modules: Mapping[str, Factors], whole: Mapping[str, Tensor], new_base: str | None
) -> dict[str, Any]:
    """adapter_config.json: what most modules have as r and lora_alpha, the others in the two patterns."""
    rslora = bool(tree.get("use_rslora"))
    ranks = {path: len(part.a_RD) for path, part in modules.items()}
    alphas = {p: _alpha(part.scale, ranks[p], rslora=rslora) for p, part in modules.items()}
    r, alpha = Counter((rank, alphas[path]) for path, rank in ranks.items()).most_common(1)[0][0]
    names = {path.rpartition(".")[2] for path in modules} if _in_every_layer(tree) else set(modules)
    saved = {name.rpartition(".")[0].rpartition(".")[2] for name in whole}
    return {
        **tree,
        "peft_type": "LORA",
        "inference_mode": True,
        "target_modules": sorted(names),
        "modules_to_save": sorted(saved) or None,
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": _pattern(ranks, r),
        "alpha_pattern": _pattern(alphas, alpha),
        "layers_to_transform": None,
        "layers_pattern": None,
        "exclude_modules": None,
        "init_lora_weights": True,
        "base_model_name_or_path": new_base,
    }


def _in_every_layer(tree: Mapping[str, Any]) -> bool:
    """Whether the last names of the modules say which they are; else they need their whole paths."""
    targets = tree["target_modules"]
    narrowed = tree.get("layers_to_transform") is not None or tree.get("exclude_modules")
    return isinstance(targets, list) and not narrowed and not any("." in target for target in targets)


def _alpha(scale: float, r: int, *, rslora: bool) -> float:
    """32, not 32.0 or 31.999999: other readers of adapter_config.json take integers only."""
    alpha = scale * (math.sqrt(r) if rslora else r)
    return round(alpha) if math.isclose(alpha, round(alpha)) else alpha


def _pattern(values: Mapping[str, float], usual: float) -> dict[str, float]:
    """The exceptions: by the module's last name where all of that name agree, else by its path."""
    by_name: dict[str, set[float]] = {}
    for path, value in values.items():
        by_name.setdefault(path.rpartition(".")[2], set()).add(value)
    exceptions = {path: value for path, value in values.items() if value != usual}
    return {
        path.rpartition(".")[2] if len(by_name[path.rpartition(".")[2]]) == 1 else path: value
        for path, value in exceptions.items()
    }


def _written(modules: Mapping[str, Factors], whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = {f"{_PREFIX}{name}": tensor for name, tensor in whole.items()}
    for path, part in modules.items():
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = part.a_RD
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = part.b_OR
    return {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
