"""A whole recipe, run or planned: the composition that starts from a RunConfig alone.

Rooms that load torch are imported by the functions that need them, as in api.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.api import Resume, Run, download, load_model, require_resumable, train
from lorasmith.config import LoraConfig, RunConfig
from lorasmith.errors import ConfigError

if TYPE_CHECKING:
    from lorasmith.data.dataset import Dataset
    from lorasmith.families.base import Family
    from lorasmith.training.estimate import ParameterCount, Plan
    from lorasmith.training.progress import Reporter


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
    from lorasmith.training.lock import refuse_if_locked

    run_dir, proving = Path(config.train.output_dir), resume == "prove"
    if config.train.output_dir:
        require_resumable(run_dir, resume, allow_changes)
    if not proving:
        refuse_if_locked(run_dir)
    prepared = _prepare(config, rejects_path=None if proving else run_dir / "rejects.jsonl")
    if on_data:
        on_data(prepared.data)
    _count_parameters(prepared, config.lora)
    base, found = config.model, prepared.family.name
    asked: dict[str, Any] = base.model_dump(include={"hub", "revision", "chat_format", "dtype", "device"})
    model = load_model(base.path, family=found, **asked)
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
    from lorasmith.data.loader import training_loader
    from lorasmith.model.dtype import DTYPE_NAMES, resolve_device, resolve_dtype
    from lorasmith.model.load import empty_module, hidden_size
    from lorasmith.model.packed import takes_layout
    from lorasmith.model.plugin_classes import family_config
    from lorasmith.training.estimate import Plan, estimate_memory
    from lorasmith.training.loop import total_steps

    prepared = _prepare(config, rejects_path=None)
    parameters = _count_parameters(prepared, config.lora)
    model_config = family_config(prepared.directory, prepared.family)
    packed = takes_layout(empty_module(model_config))
    loader = training_loader(prepared.data.examples, config.train, packed=packed)
    rows = [batch for n in range(min(50, loader.steps_per_epoch)) for batch in loader.step(n)]
    dtype = resolve_dtype(config.model.dtype, resolve_device(config.model.device), hidden_size(model_config))
    memory = estimate_memory(
        model_config,
        parameters,
        dtype,
        row_tokens=max(len(row.input_ids) for row in rows),
        row_targets=int(max(row.num_targets for row in rows)),
        activation_checkpointing=config.train.activation_checkpointing,
    )
    return Plan(
        family=prepared.family.name,
        num_examples=loader.num_examples,
        num_held_out=len(prepared.data.held_out),
        tokens_per_epoch=loader.num_tokens,
        targets_per_epoch=loader.num_targets,
        saved_by_sharing=1 - sum(len(row.input_ids) for row in rows) / sum(row.num_tokens for row in rows),
        total_steps=total_steps(loader, config.train),
        parameters=parameters,
        memory=memory,
        dtype=DTYPE_NAMES[dtype],
    )


@dataclass(frozen=True)
class _Prepared:
    directory: Path
    family: Family
    data: Dataset


def _prepare(config: RunConfig, *, rejects_path: Path | None) -> _Prepared:
    from lorasmith.data.dataset import load
    from lorasmith.families.opening import context_length, open_chat

    for key, value in {"model.path": config.model.path, "data.train": config.data.train}.items():
        if not value:
            raise ConfigError(f"{key} is not set", fix=f"give it in the config or by --set {key}=...")
    if not config.train.output_dir:
        raise ConfigError("train.output_dir is not set", fix="give it in the config or by --output-dir")
    directory = download(config.model.path, hub=config.model.hub, revision=config.model.revision)
    family, chat_format = open_chat(directory, config.model.family, config.model.chat_format)
    limit = context_length(directory)
    data = load(config.data, chat_format, model_max_length=limit, rejects_path=rejects_path)
    return _Prepared(directory, family, data)


def _count_parameters(prepared: _Prepared, lora: LoraConfig) -> ParameterCount:
    from lorasmith.model.plugin_classes import family_config
    from lorasmith.training.estimate import count_parameters

    model_config = family_config(prepared.directory, prepared.family)
    return count_parameters(model_config, lora, prepared.family.target_modules)
