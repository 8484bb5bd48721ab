"""Checkpoints: what a resume needs, published by one rename, checked by a manifest before it is trusted.

MANIFEST.json: {"format": 2, "files": {name: {"size": bytes, "sha256": hex}}, "fingerprints": {of: hex}},
where "of" is config, data and base. Only safetensors and JSON: nothing that is read can run code.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save

from lorasmith.errors import CheckpointError
from lorasmith.model.adapter import adapter_files, restore_adapter, trainable_parameters
from lorasmith.storage import Storage
from lorasmith.training.guard import RECENT

FORMAT = 2
"""Of MANIFEST.json and state.json."""
_MANIFEST, _STATE, _OPTIMIZER = "MANIFEST.json", "state.json", "optimizer.safetensors"
_VALUE = "/value"
STEP_NAME = r"step-\d{6,}"
_STEP_DIR = re.compile(STEP_NAME)
_ROOM_FOR_NAMES = 1 << 20
"""Bytes for headers, JSON and the rounding of the file system, beside the tensors of a checkpoint."""


@dataclass(frozen=True)
class TrainState:
    """Where a run stands. Order, learning rate and dropout masks are functions of `step`, so this is all."""

    step: int = 0
    """Optimizer steps taken."""
    window_loss: float = 0.0
    """Sum of losses over the targets seen since the last line of metrics.jsonl."""
    window_targets: float = 0.0
    best_step: int | None = None
    best_eval_loss: float | None = None
    evals_since_best: int = 0
    evaluation_due: bool = False
    """The step was taken, its evaluation was not: a signal came before."""
    recent_losses: Sequence[float] = ()
    """Of the last steps taken, which a spike is measured against."""
    skipped_steps: int = 0
    """Steps whose loss or gradient was not finite, so that no update was made."""
    skipped_in_a_row: int = 0
    tokens_that_fit: int | None = None
    """The longest row, where a step ran out of memory; None: train.max_tokens holds."""
    tokens_asked: int | None = None
    """train.max_tokens at that time: another value is tried anew."""
    layers_recomputed: int = 0
    """At least so many, since a step ran out of memory."""
    depends_on: Mapping[str, Any] = field(default_factory=dict)
    """What the adapter is a function of: each setting by its dotted key, and hashes of data and base."""

    def after(self, loss: float, num_targets: float) -> TrainState:
        return replace(
            self,
            step=self.step + 1,
            window_loss=self.window_loss + loss * num_targets,
            window_targets=self.window_targets + num_targets,
            recent_losses=(*self.recent_losses, loss)[-RECENT:],
            skipped_in_a_row=0,
        )

    def skipping(self) -> TrainState:
        return replace(
            self,
            step=self.step + 1,
            skipped_steps=self.skipped_steps + 1,
            skipped_in_a_row=self.skipped_in_a_row + 1,
        )


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:06d}"


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
        _OPTIMIZER: _optimizer_bytes(model, optimizer, with_values=initial is not None),
        _STATE: _json_bytes({"format": FORMAT, **asdict(state)}),
    }
    files[_MANIFEST] = _manifest(files, state.depends_on)
    path = checkpoint_dir(run_dir, state.step)
    storage.make_dir(path.parent)
    _set_aside_later(storage, run_dir, state.step)
    if damage(path) is None and (path / _MANIFEST).read_bytes() == files[_MANIFEST]:
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
        if _step_of(path) > step:
            storage.rename(path, path.with_name(f"set-aside-{path.name}-{uuid.uuid4().hex[:8]}"))


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Published checkpoints, oldest step first: by number, never by the clock."""
    found = [p for p in (run_dir / "checkpoints").glob("step-*") if _STEP_DIR.fullmatch(p.name)]
    return sorted(found, key=_step_of)


def newest_checkpoint(run_dir: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that verifies, and those passed over with the reason."""
    skipped: dict[Path, str] = {}
    for path in reversed(list_checkpoints(run_dir)):
        problem = damage(path)
        if problem is None:
            return path, skipped
        skipped[path] = problem
    return None, skipped


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if it holds the files of its manifest, each as it was written."""
    try:
        return _damage(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"


def _damage(path: Path) -> str | None:
    if path.is_symlink():
        return "it is a symbolic link"
    irregular = [p.name for p in path.iterdir() if p.is_symlink() or not p.is_file()]
    if irregular:
        return f"not regular files: {', '.join(sorted(irregular))}"
    data = (path / _MANIFEST).read_bytes()
    manifest = json.loads(data)
    if manifest.get("format") != FORMAT:
        return f"{_MANIFEST} has format {manifest.get('format')!r}, this version of lorasmith reads {FORMAT}"
    there = {p.name for p in path.iterdir()} - {_MANIFEST}
    if missing := manifest["files"].keys() - there:
        return f"missing files: {', '.join(sorted(missing))}"
    if surplus := there - manifest["files"].keys():
        return f"unknown files: {', '.join(sorted(surplus))}"
    for name, expected in manifest["files"].items():
        if (path / name).stat().st_size != expected["size"] or _fingerprint(path / name) != expected:
            return f"{name} is not what was written"
    state = read_state(path)
    if data != _json_bytes(manifest) or manifest["fingerprints"] != _fingerprints(state.depends_on):
        return f"{_MANIFEST} is not what was written"
    return None if state.step == _step_of(path) else f"it holds step {state.step}"


def read_state(path: Path) -> TrainState:
    """Raises: CheckpointError for a state that another version wrote."""
    tree = json.loads((path / _STATE).read_text(encoding="utf-8"))
    known = {field.name for field in fields(TrainState)}
    if tree.pop("format", None) != FORMAT or tree.keys() - known:
        raise CheckpointError("this checkpoint was written by another version of lorasmith", where=str(path))
    return TrainState(**tree)


def require_same_run(state: TrainState, depends_on: Mapping[str, Any], path: Path) -> None:
    """Raises: CheckpointError naming what changed since the checkpoint was written."""
    changed = [name for name, value in depends_on.items() if state.depends_on.get(name) != value]
    if changed:
        told = [f"{name} was {state.depends_on.get(name)!r}, is {depends_on[name]!r}" for name in changed]
        raise CheckpointError(
            f"this checkpoint belongs to another run: {', '.join(changed)} changed",
            where=str(path),
            why="; ".join(told),
            fix="resume with the config, data and base it was started with, or choose a new train.output_dir",
        )


def restore(path: Path, model: peft.PeftModel, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's adapter and moments back, bit by bit.

    Raises: CheckpointError, before anything is changed, if it is not what was written.
    """
    problem = damage(path)
    if problem is not None:
        fix = "the other checkpoints stand: chat, generate and merge take one by --checkpoint"
        raise CheckpointError(f"{path.name} is damaged", where=str(path), why=problem, fix=fix)
    tensors = load_file(path / _OPTIMIZER)
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
        if _step_of(path) != best_step:
            storage.remove_dir(path)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _optimizer_bytes(model: peft.PeftModel, optimizer: torch.optim.Optimizer, *, with_values: bool) -> bytes:
    """AdamW's moments; also the parameters, where the adapter's file does not hold them as they are."""
    tensors = {}
    for name, parameter in trainable_parameters(model).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = value.detach().cpu().contiguous()
        if with_values:
            tensors[name + _VALUE] = parameter.detach().cpu().contiguous()
    return save(dict(sorted(tensors.items())))


def _manifest(files: Mapping[str, bytes], depends_on: Mapping[str, Any]) -> bytes:
    told = {n: {"size": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in files.items()}
    return _json_bytes({"format": FORMAT, "files": told, "fingerprints": _fingerprints(depends_on)})


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": sha256}


def _fingerprints(depends_on: Mapping[str, Any]) -> dict[str, str | None]:
    """Of the config (all settings that the adapter depends on, as one), of the data and of the base."""
    settings = {key: value for key, value in depends_on.items() if key not in ("data", "base")}
    config = hashlib.sha256(json.dumps(settings, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
    return {"config": config, "data": depends_on.get("data"), "base": depends_on.get("base")}


def _json_bytes(tree: Mapping[str, Any]) -> bytes:
    return (json.dumps(tree, indent=2, ensure_ascii=False) + "\n").encode()
