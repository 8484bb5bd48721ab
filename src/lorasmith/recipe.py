"""A whole recipe, run or planned: the composition that starts from a RunConfig alone.

Rooms that load torch are imported by the functions that need them, as in api.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorasmith.api import Resume, Run, download, opened_model, require_resumable, train
from lorasmith.config import LoraConfig, RunConfig
from lorasmith.errors import ConfigError

if TYPE_CHECKING:
    import peft

    from lorasmith.data.dataset import Dataset
    from lorasmith.families.base import Family
    from lorasmith.memory.estimate import Plan
    from lorasmith.runs.progress import Reporter
    from lorasmith.text.template import ChatFormat


def run(
    config: RunConfig,
    *,
    resume: Resume = False,
    allow_changes: Sequence[str] = (),
    reporter: Reporter | None = None,
    on_data: Callable[[Dataset], None] | None = None,
) -> Run:
    """A whole recipe. The data is checked first, then the targets, then the weights are read.

    `on_data` is told the data set before the weights are read: the command line prints its report.
    """
    from lorasmith.runs.lock import refuse_if_locked
    from lorasmith.runs.run_dir import REJECTS_FILE

    run_dir, proving = Path(config.train.output_dir), resume == "prove"
    if config.train.output_dir:
        require_resumable(run_dir, resume, allow_changes)
    if not proving:
        refuse_if_locked(run_dir)
    prepared = _prepare(config, rejects_path=None if proving else run_dir / REJECTS_FILE)
    if on_data:
        on_data(prepared.data)
    _adapted_on_meta(prepared, config.lora)
    model = opened_model(config.model, prepared.directory, prepared.family, prepared.chat_format)
    return train(
        model,
        prepared.data,
        output_dir=config.train.output_dir,
        lora=config.lora,
        train=config.train,
        resume=resume,
        allow_changes=allow_changes,
        reporter=reporter,
    )


def plan(config: RunConfig) -> Plan:
    """What `run` would do and need: reads the data, config.json and the tokenizer, never the weights."""
    from lorasmith.batching.loader import training_loader
    from lorasmith.memory.estimate import Plan, count_parameters, layers_asked, needed_memory
    from lorasmith.memory.limits import free_memory
    from lorasmith.model.checkpointing import decoder_layers
    from lorasmith.model.dtype import DTYPE_NAMES, resolve_device, resolve_dtype
    from lorasmith.model.load import hidden_size
    from lorasmith.model.packed import as_computed, takes_layout
    from lorasmith.training.loop import total_steps

    prepared = _prepare(config, rejects_path=None)
    model = _adapted_on_meta(prepared, config.lora)
    by_layout = takes_layout(model)
    loader = training_loader(prepared.data.examples, config.train, packed=by_layout)
    rows = [batch for n in range(min(50, loader.steps_per_epoch)) for batch in loader.step(n)]
    device = resolve_device(config.model.device)
    dtype = resolve_dtype(config.model.dtype, device, hidden_size(model.get_base_model().config))
    length = config.train.max_tokens if config.train.static_rows else None
    computed = [as_computed(row, device, length) for row in rows] if by_layout else rows
    needed = needed_memory(model, computed, dtype, device, fp8_base=config.train.fp8_base)
    free = free_memory(device)
    layers = layers_asked(model, config.train.activation_checkpointing, free, lambda n: needed(n).total)
    return Plan(
        family=prepared.family.name,
        num_examples=loader.num_examples,
        num_held_out=len(prepared.data.held_out),
        tokens_per_epoch=loader.num_tokens,
        targets_per_epoch=loader.num_targets,
        saved_by_sharing=1 - sum(len(row.input_ids) for row in rows) / sum(row.num_tokens for row in rows),
        total_steps=total_steps(loader, config.train),
        parameters=count_parameters(model),
        memory=needed(layers),
        free_memory=free,
        recomputed_layers=layers,
        num_layers=len(decoder_layers(model)),
        dtype=DTYPE_NAMES[dtype],
    )


@dataclass(frozen=True)
class _Prepared:
    directory: Path
    family: Family
    chat_format: ChatFormat
    data: Dataset


def _prepare(config: RunConfig, *, rejects_path: Path | None) -> _Prepared:
    from lorasmith.data.dataset import load
    from lorasmith.families.opening import context_length, open_chat
    from lorasmith.files.adapter_dir import is_adapter_dir

    for key, value in {"model.path": config.model.path, "data.train": config.data.train}.items():
        if not value:
            raise ConfigError(f"{key} is not set", fix=f"give it in the config or by --set {key}=...")
    if not config.train.output_dir:
        raise ConfigError("train.output_dir is not set", fix="give it in the config or by --output-dir")
    directory = download(config.model.path, hub=config.model.hub, revision=config.model.revision)
    if is_adapter_dir(directory):
        raise ConfigError(
            "model.path is a run or an adapter, not a base model",
            where=str(directory),
            fix="name its base model there; lora.init_from goes on from an adapter",
        )
    family, chat_format = open_chat(directory, config.model.family, config.model.chat_format)
    limit = context_length(directory)
    data = load(config.data, chat_format, model_max_length=limit, rejects_path=rejects_path)
    return _Prepared(directory, family, chat_format, data)


def _adapted_on_meta(prepared: _Prepared, lora: LoraConfig) -> peft.PeftModel:
    from lorasmith.memory.estimate import adapted_on_meta
    from lorasmith.model.plugin_classes import family_config

    model_config = family_config(prepared.directory, prepared.family)
    return adapted_on_meta(model_config, lora, prepared.family.target_modules)
