"""A model directory -> a transformers module, natively: config.json is data, remote code is never run."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging

from lorasmith.errors import FamilyError, SetupError
from lorasmith.files.model_config import read_model_json
from lorasmith.files.torch_archive import refuse_swelling
from lorasmith.native.registry import native_model_type, register_native
from lorasmith.ops.gemm import bound_product_stores

CODE_KEYS = ("auto_map", "custom_pipelines", "_attn_implementation", "_attn_implementation_internal")
"""Keys of config.json that name code to run; they are dropped, never followed (CVE-2026-4372)."""

_CACHE_LINE = 64
"""Bytes; torch's own memory on a CPU begins at such a border."""
_STRAY_BUFFERS = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")
"""Buffers that old checkpoints stored beside the weights."""


def read_model_config(directory: Path) -> PretrainedConfig:
    """config.json as transformers' own config class.

    Raises: SetupError without a readable config.json; FamilyError for a model_type that transformers does
    not know or that is no causal language model.
    """
    tree = read_model_json(directory)
    if "quantization_config" in tree:
        raise SetupError(
            "this base model is quantised",
            where=str(directory / "config.json"),
            why="LoRA is trained here over bf16, fp16 or fp32 weights",
            fix="use the unquantised model",
        )
    register_native()
    said = tree.pop("model_type", None)
    model_type = native_model_type({**tree, "model_type": said}) or said
    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise FamilyError(
            f"model_type {model_type!r} is no chat model that this transformers knows",
            where=str(directory / "config.json"),
            fix="`lorasmith families` lists what runs; a newer transformers may know this model_type",
        )
    for key in CODE_KEYS:
        tree.pop(key, None)
    try:
        config: PretrainedConfig = CONFIG_MAPPING[model_type].from_dict(tree)
    except FamilyError:  # a native class's own refusal
        raise
    except Exception as error:  # each class checks its keys in its own way, with errors of any kind
        raise SetupError(
            f"config.json is no config of a {model_type} model",
            where=str(directory / "config.json"),
            why=_first_line(error),
            fix="get this file again from the model's own source",
        ) from error
    return config


def empty_module(config: PretrainedConfig) -> PreTrainedModel:
    """The module without memory (meta device): names, shapes and counts of parameters."""
    with torch.device("meta"):
        module: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return module


def load_base(
    directory: Path, config: PretrainedConfig, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Weights from safetensors or .bin shards (unpickled with weights_only), every tensor accounted for.

    Raises: SetupError naming missing, unknown or misshapen tensors, or an archive that is refused.
    """
    for path in sorted(directory.glob("pytorch_model*.bin")):
        if zipfile.is_zipfile(path):
            refuse_swelling(path)
    bound_product_stores()
    try:
        with without_progress_bar():
            module, info = AutoModelForCausalLM.from_pretrained(
                directory.absolute(),  # an adapter names it as its base, and outlives the working directory
                config=config,
                dtype=dtype,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
    except pickle.UnpicklingError as error:
        raise SetupError(
            "the weights hold more than tensors",
            where=str(directory),
            why="a .bin file is a pickle, and this one names code to run; it was not run",
            fix="get the model from a source you trust, best as safetensors",
        ) from error
    except Exception as error:  # transformers raises anything at all for files that are damaged
        raise SetupError(
            "the weights cannot be read",
            where=str(directory),
            why=_first_line(error),
            fix="check that the directory is a complete download (`lorasmith download` resumes one)",
        ) from error
    _refuse_gaps(info, directory)
    base: PreTrainedModel = module.to(device).eval()
    return base


def align_weights(module: nn.Module) -> None:
    """Copy what does not begin at a cache line's border to where it does; values and ties stay as they were.

    safetensors maps a file into memory, and its weights begin where its header ends, by eights of bytes.
    On a CPU dX = dY W reads such a weight across cache lines, at three quarters of the rate.
    """
    for weight in module.parameters():
        if weight.device.type == "cpu" and weight.data_ptr() % _CACHE_LINE:
            weight.data = weight.detach().clone()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def without_progress_bar() -> Iterator[None]:
    """Reading and writing weights without transformers' own bar, which has no line of its own to stand on."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _refuse_gaps(info: dict[str, Any], directory: Path) -> None:
    unknown = [name for name in info["unexpected_keys"] if not name.endswith(_STRAY_BUFFERS)]
    problems = {"missing": info["missing_keys"], "unknown": unknown, "misshapen": info["mismatched_keys"]}
    told = [f"{kind}: {', '.join(_names(names))}" for kind, names in problems.items() if names]
    if told:
        raise SetupError(
            "the checkpoint's tensors are not this model's",
            where=str(directory),
            why="; ".join(told),
            fix="check that config.json and the weights belong together and that no shard is missing",
        )


def _names(names: Any) -> list[str]:
    ordered = sorted(str(name[0] if isinstance(name, tuple) else name) for name in names)
    return [*ordered[:5], f"and {len(ordered) - 5} more"] if len(ordered) > 5 else ordered


def module_dtype(module: torch.nn.Module) -> torch.dtype:
    return next(p.dtype for p in module.parameters() if p.is_floating_point())


def hidden_size(config: PretrainedConfig) -> int:
    return int(config.get_text_config().hidden_size)
