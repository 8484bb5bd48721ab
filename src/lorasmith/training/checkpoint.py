"""Checkpoints: what a resume needs, published by one rename. `manifest` says which of them to trust."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file, save

from lorasmith.adapters.lora import adapter_files, restore_adapter, trainable_parameters
from lorasmith.errors import CheckpointError
from lorasmith.runs.manifest import (
    FORMAT,
    MANIFEST,
    OPTIMIZER,
    STATE,
    TrainState,
    checkpoint_dir,
    damage,
    json_bytes,
    list_checkpoints,
    manifest_bytes,
    step_of,
)
from lorasmith.storage import Storage

_VALUE = "/value"
_ROOM_FOR_NAMES = 1 << 20
"""Bytes for headers, JSON and the rounding of the file system, beside the tensors of a checkpoint."""


def save_checkpoint(
    storage: Storage,
    run_dir: Path,
    state: TrainState,
    model: peft.PeftModel,
    optimizer: torch.optim.Optimizer,
    initial: Mapping[str, torch.Tensor] | None,
) -> Path:
    """`initial` as for `adapter_files`. Raises: StorageError; earlier checkpoints are untouched then."""
    files = {
        **adapter_files(model, initial),
        OPTIMIZER: _optimizer_bytes(model, optimizer, with_values=initial is not None),
        STATE: json_bytes({"format": FORMAT, **asdict(state)}),
    }
    files[MANIFEST] = manifest_bytes(files, state.depends_on)
    path = checkpoint_dir(run_dir, state.step)
    storage.make_dir(path.parent)
    _set_aside_later(storage, run_dir, state.step)
    if damage(path) is None and (path / MANIFEST).read_bytes() == files[MANIFEST]:
        return path
    storage.publish_dir(path, files)
    return path


def require_room(
    storage: Storage, run_dir: Path, model: peft.PeftModel, initial: Mapping[str, torch.Tensor] | None
) -> None:
    """Before the first step: one checkpoint that stands, one being written, and the final adapter.

    Raises: StorageError with the bytes that are needed and those that are free.
    """
    adapter = sum(p.numel() * p.element_size() for p in trainable_parameters(model).values())
    parts = 3 if initial is None else 5  # adapter, two moments; of twice the rank, and the values as they are
    storage.require_free(run_dir, 2 * (parts * adapter + _ROOM_FOR_NAMES) + adapter)


def _set_aside_later(storage: Storage, run_dir: Path, step: int) -> None:
    """A later checkpoint was passed over or gone back from: retention must not count it as the newest."""
    for path in list_checkpoints(run_dir):
        if step_of(path) > step:
            storage.rename(path, path.with_name(f"set-aside-{path.name}-{uuid.uuid4().hex[:8]}"))


def restore(path: Path, model: peft.PeftModel, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's adapter and moments back, bit by bit.

    Raises: CheckpointError, before anything is changed, if it is not what was written.
    """
    problem = damage(path)
    if problem is not None:
        fix = "the other checkpoints stand: chat, generate and merge take one by --checkpoint"
        raise CheckpointError(f"{path.name} is damaged", where=str(path), why=problem, fix=fix)
    tensors = load_file(path / OPTIMIZER)
    if not any(key.endswith(_VALUE) for key in tensors):
        restore_adapter(model, path)
    for name, parameter in trainable_parameters(model).items():
        own = {key.removeprefix(name): t for key, t in tensors.items() if key.startswith(f"{name}/")}
        if _VALUE in own:
            parameter.data.copy_(own.pop(_VALUE))
        optimizer.state[parameter] = {
            key.removeprefix("/"): t if key == "/step" else t.to(parameter.device) for key, t in own.items()
        }


def prune(storage: Storage, run_dir: Path, keep: int | None, best_step: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and the best one."""
    if keep is None:
        return
    for path in list_checkpoints(run_dir)[:-keep]:
        if step_of(path) != best_step:
            storage.remove_dir(path)


def _optimizer_bytes(model: peft.PeftModel, optimizer: torch.optim.Optimizer, *, with_values: bool) -> bytes:
    """AdamW's moments; also the parameters, where the adapter's file does not hold them as they are."""
    tensors = {}
    for name, parameter in trainable_parameters(model).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = value.detach().cpu().contiguous()
        if with_values:
            tensors[name + _VALUE] = parameter.detach().cpu().contiguous()
    return save(dict(sorted(tensors.items())))
