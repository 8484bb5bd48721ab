"""An adapter directory from elsewhere, checked against the base before any of it is used.

What the adapter must be is asked of peft itself, on a copy of the base without memory (meta device): the
names and shapes that it lists there are those the file must have, neither more nor less.
"""

from __future__ import annotations

import copy
import dataclasses
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import peft
import torch
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lorasmith.errors import SetupError
from lorasmith.files.adapter_config import read_adapter_config, several
from lorasmith.files.adapter_dir import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PICKLED_ADAPTER_WEIGHTS
from lorasmith.files.model_dir import require_regular
from lorasmith.files.name_patterns import try_patterns
from lorasmith.files.tensor_header import TensorHeader, read_header
from lorasmith.files.torch_archive import refuse_swelling

Shape: TypeAlias = tuple[int, ...]
_MOST_TENSORS = 200_000
_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class Fit:
    """What an adapter's file must be over one base."""

    config: peft.LoraConfig
    wanted: Mapping[str, Shape]
    """The tensors that it must hold."""
    allowed: Mapping[str, Shape]
    """These, and embeddings that peft saves beside an adapter on them."""
    base: str
    """The base that the adapter names."""


def checked_adapter(module: nn.Module, directory: Path) -> peft.LoraConfig:
    """The adapter's settings, once they and its tensors are known to fit `module` and to be finite. Only the
    names, types and shapes of `module` count: it may lie on the meta device.

    Raises: SetupError naming the key or the tensors.
    """
    fit = adapter_fit(module, directory)
    weights = adapter_weights(directory)
    with _unreadable_told(weights):
        if weights.name == ADAPTER_WEIGHTS:
            require_fit(read_header(weights), fit, weights)
            _require_finite(_stored(weights), weights)
        else:
            _check_pickled(weights, fit)
    return fit.config


def adapter_fit(module: nn.Module, directory: Path) -> Fit:
    """What the settings of the adapter ask of its tensors over `module`; none of them is read.

    Raises: SetupError for settings that are refused, or that no layer of the base takes.
    """
    settings = read_adapter_config(directory)
    where = str(directory / ADAPTER_CONFIG)
    try_patterns(settings, [name for name, _ in module.named_modules()], where=where)
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    try:
        config = peft.LoraConfig(**{key: value for key, value in settings.items() if key in known})
        wanted, allowed = _wanted_shapes(module, config)
    except Exception as error:  # peft raises anything for settings that go with no layer
        raise SetupError(
            "the adapter does not fit this base model",
            where=where,
            why=(str(error).strip() or type(error).__name__).splitlines()[0],
            fix="check that it was trained on this model (base_model_name_or_path in adapter_config.json)",
        ) from error
    base = str(settings.get("base_model_name_or_path", "a model that it does not name"))
    return Fit(config, wanted, allowed, base)


def _wanted_shapes(module: nn.Module, config: peft.LoraConfig) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """What the file must hold, and what else it may: embeddings that peft saves beside an adapter on them."""
    settings = copy.deepcopy(config)
    settings.init_lora_weights = False
    model = peft.get_peft_model(_without_memory(module), settings, low_cpu_mem_usage=True)
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    whole = get_peft_model_state_dict(model, save_embedding_layers=True)
    _refuse_huge_ranks(wanted)
    shapes = {name: tuple(tensor.shape) for name, tensor in whole.items()}
    return {name: shapes[name] for name in wanted}, shapes


def _without_memory(module: nn.Module) -> nn.Module:
    """A deep copy on the meta device, which costs nothing; what is tied stays tied."""
    memo: dict[int, object] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(module, memo)


def _refuse_huge_ranks(wanted: Mapping[str, Tensor]) -> None:
    for name, tensor in wanted.items():
        other = wanted.get(name.replace("lora_A", "lora_B"))
        if "lora_A" not in name or other is None or tensor.dim() != 2 or other.dim() != 2:
            continue
        (rank, inputs), outputs = tensor.shape, len(other)
        if rank > max(inputs, outputs):
            raise ValueError(
                f"its rank {rank:,} is above both sizes of {_module_of(name)}, {inputs:,} and {outputs:,}"
            )


def _module_of(name: str) -> str:
    return name.removeprefix("base_model.model.").partition(".lora_")[0]


def adapter_weights(directory: Path) -> Path:
    """The file of its tensors; peft would look on the hub for one that is not there. Raises: SetupError."""
    for name in (ADAPTER_WEIGHTS, PICKLED_ADAPTER_WEIGHTS):
        if (directory / name).exists():
            require_regular(directory / name)
            return directory / name
    raise SetupError(
        f"there is no {ADAPTER_WEIGHTS}",
        where=str(directory),
        fix="check the path: an adapter directory holds it beside adapter_config.json",
    )


@contextmanager
def _unreadable_told(weights: Path) -> Iterator[None]:
    damaged = "copy or download the file again"
    try:
        yield
    except pickle.UnpicklingError:
        why = "a .bin file is a pickle, and this one holds more than tensors; nothing of it was run"
        fix = "get the adapter as safetensors, from a source you trust"
        raise SetupError(f"{weights.name} is refused", where=str(weights), why=why, fix=fix) from None
    except (SafetensorError, zipfile.BadZipFile, EOFError, OSError, RuntimeError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SetupError(f"{weights.name} cannot be read", where=str(weights), why=why, fix=damaged) from None


def require_fit(header: Mapping[str, TensorHeader], fit: Fit, weights: Path) -> None:
    """The header alone against what the file must hold. Raises: SetupError naming the tensors."""
    _require_few(len(header), weights)
    _require_shapes({name: tensor.shape for name, tensor in header.items()}, fit, weights)
    kinds = {name: tensor.dtype for name, tensor in header.items()}
    _require_floats({name: kind for name, kind in kinds.items() if kind not in _FLOATS}, weights)


def _stored(weights: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(weights, framework="pt") as file:
        for name in list(file.keys()):
            yield name, file.get_tensor(name)


def _check_pickled(weights: Path, fit: Fit) -> None:
    """Unpickled with weights_only, and only where the archive holds no more than the file's own bytes."""
    refuse_swelling(weights)
    tensors = torch.load(weights, map_location="cpu", weights_only=True)
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise pickle.UnpicklingError("it is no table of tensors")
    _require_few(len(tensors), weights)
    _require_shapes({str(name): tuple(tensor.shape) for name, tensor in tensors.items()}, fit, weights)
    strange = {name: str(t.dtype) for name, t in tensors.items() if t.dtype not in _FLOATS.values()}
    _require_floats(strange, weights)
    _require_finite(iter(tensors.items()), weights)


def _require_few(count: int, weights: Path) -> None:
    if count > _MOST_TENSORS:
        why = f"it holds {count:,} tensors, and no adapter needs more than {_MOST_TENSORS:,}"
        raise SetupError(f"{weights.name} is refused", where=str(weights), why=why)


def _require_shapes(found: Mapping[str, Shape], fit: Fit, weights: Path) -> None:
    missing = sorted(set(fit.wanted) - set(found))
    unknown = sorted(set(found) - set(fit.allowed))
    misshapen = [
        f"{name} {found[name]} instead of {fit.allowed[name]}"
        for name in sorted(found)
        if name in fit.allowed and found[name] != fit.allowed[name]
    ]
    problems = {"missing": missing, "unknown": unknown, "misshapen": misshapen}
    told = [f"{kind}: {several(names)}" for kind, names in problems.items() if names]
    if told:
        raise SetupError(
            "the adapter does not fit this base model",
            where=str(weights),
            why=". ".join(told),
            fix=f"load it over the model that it was trained on; it names {fit.base}",
        )


def _require_floats(strange: Mapping[str, str], weights: Path) -> None:
    if strange:
        why = several([f"{name} is {kind}" for name, kind in sorted(strange.items())])
        fix = "save the adapter again in fp32, bf16 or fp16"
        raise SetupError("the adapter's tensors are no plain floats", where=str(weights), why=why, fix=fix)


def _require_finite(tensors: Iterator[tuple[str, Tensor]], weights: Path) -> None:
    broken = [name for name, tensor in tensors if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise SetupError(
            "the adapter holds NaN or infinity",
            where=str(weights),
            why=several(broken),
            fix="its training diverged or the file is damaged: take an earlier checkpoint",
        )
